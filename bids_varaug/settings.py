"""What one run was asked to do: made once from the command line, passed explicitly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """The request of one run of ``bids_varaug``; nothing in it changes afterwards.

    Paths are absolute. Labels carry no ``sub-``/``ses-`` prefix. An empty tuple means "all".
    """

    bids_dir: Path
    output_dir: Path
    level: str
    work_dir: Path
    participant_labels: tuple[str, ...] = ()
    exclude_participant_labels: tuple[str, ...] = ()
    session_labels: tuple[str, ...] = ()
    bids_filters: Mapping[str, Mapping] = field(default_factory=dict)
    bids_database_dir: Path | None = None
    skip_bids_validation: bool = False
    trust: str | None = None
    ensemble: str = "aseg31"
    members: tuple[str, ...] = ("all",)
    n_members: int | None = None
    perturb_inference: int = 0
    write_members: bool = False
    family_maps: bool = False
    freesurfer_dir: Path | None = None
    output_spaces: tuple[str, ...] = ()  # NAME or NAME:res-N, see `registration.space.OutputSpace`
    refine: int = 25
    allow_downloads: bool = False
    template_t1w: Path | None = None  # of the output spaces'; None until it was looked for
    device: str = "cpu"
    nprocs: int = 1
    omp_nthreads: int = 1
    mem_gb: float | None = None
    plugin: Mapping | None = None
    clean_workdir: bool = False
    random_seed: int = 0
    sloppy: bool = False
    whole_voxels: bool = False
    dry_run: bool = False
    reports_only: bool = False
    stop_on_first_crash: bool = False
    verbosity: int = 0
    # Group level.
    age_column: str = "age"
    site_column: str = "site"
    sex_column: str = "sex"
    no_brain_age: bool = False
    include: str | None = None
    target: str | None = None
    covariates: tuple[str, ...] = ()
    brainage_model: str = "auto"
    augmentation: str = "all"
    cv_folds: int = 5
    features: str = "volumes"
    encoder: Path | None = None  # with features "images"
    features_table: Path | None = None
    relative_to: str | None = None
    asymmetries: bool = False
    log_volumes: bool = False
    apply_model: Path | None = None
    compare: tuple[tuple[str, Path], ...] = ()

    @property
    def plugin_name(self) -> str:
        """Nipype's plugin that runs the steps."""
        return self.plugin["plugin"] if self.plugin else "MultiProc"

    @property
    def runs_here(self) -> bool:
        """Whether the steps run on this machine, not as jobs of a batch system."""
        return self.plugin_name in ("MultiProc", "Linear", "LegacyMultiProc", "Debug")
