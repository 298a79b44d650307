"""The group level: gather, score, fit, write, report (wiring only)."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from bids_varaug.brainage import outputs, variability
from bids_varaug.brainage import target as targets
from bids_varaug.brainage.cohort import Cohort
from bids_varaug.brainage.evaluate import best_augmentation, evaluate_brain_age
from bids_varaug.brainage.features import asymmetries, relative_volumes
from bids_varaug.brainage.features_table import read_features_table
from bids_varaug.brainage.gather import gather_cohort
from bids_varaug.brainage.model_file import apply_model, features_for, load_model, model_card, save_model
from bids_varaug.brainage.models import MIN_PARTICIPANTS, BrainAgeModel, fit_brain_age
from bids_varaug.brainage.repeated_runs import read_repeated_runs
from bids_varaug.brainage.target import TargetData, TargetEvaluation, TargetModel
from bids_varaug.derivatives import names
from bids_varaug.derivatives.citation import cite, render
from bids_varaug.derivatives.io import summarise_regions, with_bids_labels, write_table
from bids_varaug.derivatives.sidecars import write_group_dataset_files
from bids_varaug.errors import FiltersError, UsageError, UserError
from bids_varaug.files import write_json, write_text
from bids_varaug.inputs.freesurfer import read_minimum_dice_csv
from bids_varaug.inputs.matching import look_up_people, match_people
from bids_varaug.inputs.participants import NOBODY, People, read_people
from bids_varaug.inputs.tables import TableError, by_reason, find_column, participants_where, read_variables, some
from bids_varaug.machine import resolve_device, use_threads
from bids_varaug.models.ensemble import sha256_of
from bids_varaug.reports.group import ComparedPipeline, applied_page, evaluation_page, load_page, target_page
from bids_varaug.settings import Settings
from bids_varaug.workflows.group_maps import write_group_maps
from bids_varaug.workflows.quality import note, run_info, write_quality

if TYPE_CHECKING:  # torch
    from bids_varaug.models.encoders import EncoderEnsemble

MODEL = "models/brainage.skops"


def run_group(settings: Settings) -> Path | None:
    """Score the augmented brain-age model, or apply one; return the file to look at first.

    With ``--dry-run`` nothing is fitted or written, and there is no such file. With ``--reports-only`` the page of the
    last run is rewritten from what that run left. Raises `UserError` if there are too few people with age, or what was
    asked for does not fit the data.
    """
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    if settings.target is not None and settings.apply_model is not None:
        raise UsageError("--target with --apply-model: the model knows its target. Give one of the two.")
    if settings.reports_only:
        return _rewrite_pages(settings)
    if settings.no_brain_age and (settings.features_table or settings.apply_model):
        raise UsageError("--no-brain-age: nothing is left to do with --features-table or --apply-model. Leave one out.")
    model = None if settings.apply_model is None else load_model(settings.apply_model)
    encoders = _load_encoders(settings, model)
    checks_volumes = model is None and settings.features_table is None and encoders is None
    everybody, people, notes = _read(settings, model)
    volumes = everybody = _select(everybody, people, settings, notes)
    no_brain_age = None
    if settings.target is None and people is not None and checks_volumes:
        no_brain_age, volumes = _with_ages(settings, everybody, people)
    without_ages = [f"Brain age is not predicted: {no_brain_age}"] if no_brain_age else []
    how = _how_made(settings, model)
    cohort = _derive(volumes, how)
    if not settings.dry_run:
        write_group_dataset_files(settings.bids_dir, settings.output_dir)
        if encoders is not None:
            cohort, volumes = _encode_images(settings, volumes, encoders, model)
            cohort = _derive(cohort, how)
    notes += [
        f"--{name.replace('_', '-')} has no effect: the model makes its features as it was fitted."
        for name, value in how.items()
        if getattr(settings, name) not in (None, False, value)
    ]
    for reason, left_out in by_reason(cohort.left_out).items():
        print(f"Left out: {len(left_out)} ({some(left_out)}): {reason}", file=sys.stderr)
    note([*notes, *without_ages])
    if settings.dry_run:
        if settings.target is not None and model is None:
            _target_data(settings, cohort, volumes, people)
        n_people = cohort.people["participant_id"].nunique()
        n_features, n_members = len(cohort.names), len(cohort.member_ids)
        if encoders is not None:
            n_features, n_members = encoders.n_features, sum(not member.is_baseline for member in encoders.members)
        print(
            f"{len(cohort)} image(s) of {n_people} participant(s), {n_features} features by {n_members} perturbed "
            "member(s)"
        )
        return None
    if checks_volumes:
        page = write_quality(settings, everybody, [*notes, *without_ages])
        if settings.output_spaces:
            print(f"Group maps: open {write_group_maps(settings, everybody, notes)}.", file=sys.stderr)
        if no_brain_age:
            return page
        print(f"For the reliability of the volumes, open {page}.", file=sys.stderr)
    if isinstance(model, TargetModel):
        return _apply_target(settings, model, cohort, volumes, people, notes)
    if settings.target is not None:
        return _score_target(settings, cohort, volumes, people, notes)
    if model is not None:
        return _apply(settings, model, cohort, notes)
    return _score(settings, cohort, volumes, notes)


def _load_encoders(settings: Settings, model: BrainAgeModel | TargetModel | None) -> EncoderEnsemble | None:
    """Encoder of the images, if features are theirs; an error for another one than that of the model."""
    trained_on = {} if model is None else model.source
    made_of_images = trained_on.get("kind") == "images"
    if settings.encoder is None and made_of_images:
        raise UsageError(
            f"{settings.apply_model}: fitted to features of images by the encoder {trained_on.get('encoder')}. Add "
            "--features images and the folder of that encoder: --encoder DIR."
        )
    if settings.encoder is None:
        return None
    if model is not None and not made_of_images:
        raise UsageError(f"{settings.apply_model}: not fitted to features of images. Leave out --features images.")
    from bids_varaug.brainage.images import check_encoder
    from bids_varaug.models.encoders import load_encoders

    encoders = load_encoders(settings.encoder)
    if model is not None:
        check_encoder(trained_on, encoders)
    return encoders


def _encode_images(
    settings: Settings, volumes: Cohort, encoders: EncoderEnsemble, model: BrainAgeModel | TargetModel | None
) -> tuple[Cohort, Cohort]:
    """Features of the images that volumes are of, and the volumes of those that have features."""
    from bids_varaug.brainage.images import gather_images

    use_threads(settings.omp_nthreads)
    return gather_images(
        settings.bids_dir, settings.output_dir, volumes, encoders, device=resolve_device(settings.device),
        features=None if model is None else model.source.get("measured", model.names),
        progress=partial(tqdm, desc="Encoding images", unit="image", disable=None),
    )  # fmt: skip


def _rewrite_pages(settings: Settings) -> Path | None:
    """Write the pages of the last run again; return the first."""
    reports = (_report_name(settings.target), names.QUALITY_REPORT, names.MAPS_REPORT)
    saved = {report: (names.logs(settings.output_dir) / report).with_suffix(".json") for report in reports}
    pages = {report: load_page(path) for report, path in saved.items() if path.exists()}
    pages = pages or {reports[0]: load_page(saved[reports[0]])}  # an error that says what is missing
    if settings.dry_run:
        return None
    return next(iter([write_text(page.html(), settings.output_dir / name) for name, page in pages.items()]))


def _with_ages(settings: Settings, cohort: Cohort, people: People) -> tuple[str | None, Cohort]:
    """Why brain age cannot be predicted, if so; and the images of known age, the others left out with reasons."""
    if settings.no_brain_age:
        return "--no-brain-age.", cohort
    known, ids = np.isfinite(cohort.age), cohort.people[["participant_id", "session_id", "observation"]]
    if cohort.people["participant_id"][known].nunique() < MIN_PARTICIPANTS:
        try:
            read_people(settings.bids_dir, age_column=settings.age_column)
        except UserError as error:
            return str(error), cohort
        listed = some([f"{who}: {why}" for who, why in people.left_out.items()], "; ")
        return f"fewer than {MIN_PARTICIPANTS} participants have an age. {listed}".strip(), cohort
    if known.all():
        return None, cohort
    same = match_people(people, ids["participant_id"], ids["session_id"].dropna().unique(), "", [])
    _, reasons = look_up_people(ids[~known], people, same)
    return None, replace(cohort.take(known), left_out=cohort.left_out | reasons)


def _target_data(settings: Settings, cohort: Cohort, volumes: Cohort, people: People | None) -> TargetData:
    """Features, target and covariates; `UserError` for a target that cannot be predicted."""
    target, variables = str(settings.target), _variables(settings, cohort, people)
    covariates = targets.encode_covariates(volumes, settings.covariates, variables)
    column = None if variables is None else find_column(list(variables), target)
    if variables is None or column is None:
        raise UserError(
            f"--target {target}: no such column, with one value for each participant, in participants.tsv or the table "
            f"of features. There are: {some([] if variables is None else list(variables))}."
        )
    return targets.prepare_target(cohort, target, variables[column], covariates, settings.cv_folds)


def _score_target(settings: Settings, cohort: Cohort, volumes: Cohort, people: People | None, notes: list[str]) -> Path:
    """Score and fit a model of --target."""
    data = _target_data(settings, cohort, volumes, people)
    target = data.name
    dropped = data.cohort.source["told_target"].items()
    _note(notes, [f"Feature {name} is left out: it {why}." for name, why in dropped])
    evaluation = _evaluate(targets.evaluate_target, settings, data)
    best = evaluation.best
    model = targets.fit_target(data, best, settings.random_seed)
    model = replace(model, training={**model.training, "covariates": list(settings.covariates)})
    described = {"augmentation": best, "categories": list(model.classes), **model.training}
    path = settings.output_dir / f"models/target_{_plain(target)}.skops"
    save_model(path, model, render("target_card.md", model=model, described=described, scores=evaluation.scores))
    for name, table in (("scores", evaluation.scores), ("gains", evaluation.gains)):
        write_table(table, path.with_name(f"{path.stem}_{name}.tsv"))
    predicted = evaluation.predictions[evaluation.predictions["augmentation"] == best]
    return _write_target(settings, data.cohort, notes, model, predicted, described, evaluation)


def _apply_target(
    settings: Settings, model: TargetModel, cohort: Cohort, volumes: Cohort, people: People | None, notes: list[str]
) -> Path:
    """Predict a target with a model fitted to other people; who lacks a covariate is left out."""
    chosen, news = features_for(model, cohort)
    _note(notes, news)
    covariates = targets.encode_covariates(volumes, model.training["covariates"], _variables(settings, cohort, people))
    known = covariates.notna().all(axis=1).to_numpy()
    missing = dict.fromkeys(cohort.people["observation"][~known], "a covariate is missing")
    chosen = replace(chosen, left_out=chosen.left_out | missing)
    covariates = covariates.reindex(columns=list(model.covariates), fill_value=0.0)
    data = TargetData(chosen, model.target, np.zeros(len(chosen)), model.classes, covariates).take(known)
    described = _describe_file(settings) | {"augmentation": model.augmentation, **model.training}
    return _write_target(settings, data.cohort, notes, model, model.predict(data), described)


def _write_target(
    settings: Settings, cohort: Cohort, notes: list[str], model: TargetModel, predicted: pd.DataFrame,
    described: Mapping[str, Any], evaluation: TargetEvaluation | None = None,
) -> Path:  # fmt: skip
    """Write table and report of a target."""
    target, applied = model.target, evaluation is None
    sidecar = json.loads(render("target.json", target=target, classes=model.classes, applied=applied))
    table = targets.target_table(predicted, model.classes)
    _write_tables(settings, {f"phenotype/target_{_plain(target)}.tsv": table}, sidecar)
    how = {"target": target, "covariates": model.training["covariates"], "classes": list(model.classes)}
    if evaluation is not None:
        how = evaluation.settings | how
    citation = cite("target", settings=how, features=_features_text(settings, cohort), applied=applied)
    run = run_info(settings, cohort, notes, citation, how)
    page = target_page(run, target, model.classes, predicted, described, evaluation)
    return page.write(settings.output_dir, _report_name(target))


def _note(notes: list[str], news: Sequence[str]) -> None:
    """Tell the user, and the page."""
    note(news)
    notes += news


def _describe_file(settings: Settings) -> dict[str, str]:
    """File of the model that is applied."""
    file = Path(str(settings.apply_model))
    return {"file": file.name, "sha256": sha256_of(file)}


def _evaluate(evaluate: Callable[..., Any], settings: Settings, data: object, **options: object) -> Any:
    """Evaluate in cross-validation, with a progress bar."""
    augmentations = None if settings.augmentation == "all" else (settings.augmentation,)
    with tqdm(desc="Fitting models", unit="fit", disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return evaluate(
            data, augmentations=augmentations, cv_folds=settings.cv_folds, seed=settings.random_seed, progress=show,
            **options,
        )  # fmt: skip


def _plain(name: str) -> str:
    """Name as BIDS allows it in a file's."""
    return re.sub(r"[^0-9A-Za-z]", "", name) or "column"


def _variables(settings: Settings, cohort: Cohort, people: People | None) -> pd.DataFrame | None:
    """Further columns of the tables, one row per observation: of each participant the value that is known."""
    found = []
    for path in _tables(settings):
        table = read_variables(path)
        by_person = table.groupby(level=0)
        several = [name for name in table if (by_person[name].nunique() > 1).any()]
        first = by_person.first().drop(columns=several)  # what changes is no variable of a person
        ids = match_people(people, list(first.index), (), "", [])
        first.index = pd.Index([ids.get(name, name) for name in first.index])
        found.append(first)
    if not found:
        return None
    table = found[0]
    for other in found[1:]:
        table = table.join(other[[name for name in other if name not in table]], how="outer")
    ids = match_people(people, list(cohort.people["participant_id"].unique()), (), "", [])
    return table.reindex([ids.get(name, name) for name in cohort.people["participant_id"]]).reset_index(drop=True)


def _read(settings: Settings, model: BrainAgeModel | TargetModel | None) -> tuple[Cohort, People | None, list[str]]:
    """Volumes, or features of a table, with age, sex and site; the people; and what to note about them."""
    columns = {name: getattr(settings, name) for name in ("age_column", "sex_column", "site_column")}
    has_own = settings.features_table is not None or settings.encoder is not None  # features, volumes are not checked
    needs_age = model is None and has_own and settings.target is None
    asked: dict[str, Any] = {"require_age": needs_age}
    if model is not None and settings.encoder is None:
        asked["features"] = model.source.get("measured", model.names)
    people, read_notes = None, list[str]()  # a table of features may have its own
    if settings.features_table is None:
        path = settings.bids_dir / "participants.tsv"
        unfetched = path.is_symlink() and not path.exists() and model is None and not settings.no_brain_age
        try:
            people = read_people(settings.bids_dir, **columns, require_age=unfetched)
        except TableError as error:
            if not settings.no_brain_age or settings.target is not None:
                raise
            people = NOBODY
            read_notes.append(f"Ages, sexes and sites are unknown: {error}")
        progress = partial(tqdm, desc="Reading tables", unit="file", disable=None)
        cohort = gather_cohort(settings.output_dir, people, progress=progress, **asked)
    else:
        if (settings.bids_dir / "participants.tsv").exists():
            people = read_people(settings.bids_dir, **columns, require_age=False)
        cohort = read_features_table(settings.features_table, people, **columns, **asked)
    return cohort, people, [*read_notes, *(people.notes if people else ()), *cohort.source.get("notes", ())]


def _select(cohort: Cohort, people: People | None, settings: Settings, notes: list[str]) -> Cohort:
    """Keep the participants and sessions that labels and condition on the command line name."""
    participants = cohort.people["participant_id"].str.removeprefix("sub-")
    chosen = ~participants.isin(settings.exclude_participant_labels)
    if settings.participant_labels:
        chosen &= participants.isin(settings.participant_labels)
        if absent := sorted(set(settings.participant_labels) - set(participants)):
            notes.append(f"--participant-label: no outputs of {some(absent)}.")
    if settings.session_labels:
        sessions = cohort.people["session_id"].fillna("").str.removeprefix("ses-")
        chosen &= sessions.isin(settings.session_labels)
    if settings.include is not None:
        wanted = participants_where(_tables(settings), settings.include)
        # Both may be spelled differently from participants.tsv; what is unclear was refused before.
        spelled = [
            pd.Series(ids, dtype=str).replace(match_people(people, ids, (), "", []))
            for ids in (wanted, list(cohort.people["participant_id"]))
        ]
        included = spelled[1].isin(spelled[0]).to_numpy()
        n_in, n = (table["participant_id"].nunique() for table in (cohort.people[included], cohort.people))
        notes.append(f"--include {settings.include!r}: {n_in} of {n} participants are in, {n - n_in} are out.")
        chosen &= included
    if not chosen.any():
        raise FiltersError(
            f"{settings.output_dir}: the participant and session labels and --include leave nobody of {len(cohort)} "
            "image(s). Check the spelling, or leave the filters out."
        )
    return cohort if chosen.all() else cohort.take(chosen.to_numpy())


def _tables(settings: Settings) -> list[Path]:
    """Tables with further columns: participants.tsv, and that of the features."""
    listed = settings.bids_dir / "participants.tsv"
    return [*([listed] if listed.exists() else []), *([settings.features_table] if settings.features_table else [])]


def _how_made(settings: Settings, model: BrainAgeModel | TargetModel | None) -> dict[str, Any]:
    """How features are made of volumes: as asked for, or as those of the model were."""
    how = {"relative_to": "none", "asymmetries": False, "log_volumes": False}
    if model is not None:
        return {name: model.source.get(name, default) for name, default in how.items()}
    how = {name: getattr(settings, name) for name in how}
    has_own = settings.features_table is not None or settings.encoder is not None
    return how | {"relative_to": how["relative_to"] or ("none" if has_own else "brain")}


def _derive(cohort: Cohort, how: Mapping[str, Any]) -> Cohort:
    """Features that need nothing learnt; logarithms are only noted, the models take them."""
    derived = asymmetries(cohort) if how["asymmetries"] else cohort  # first, as they know no head size
    if how["relative_to"] != "none":
        derived = relative_volumes(derived, how["relative_to"])
    return replace(derived, source={**cohort.source, **how, "measured": list(cohort.names)})


def _apply(settings: Settings, model: BrainAgeModel, cohort: Cohort, notes: list[str]) -> Path:
    """Predict ages with a model fitted to other people."""
    predicted = apply_model(model, cohort)
    tables = outputs.phenotype_tables(predicted)
    _note(notes, [*predicted.attrs["notes"], *outputs.remark_ages(tables[outputs.PHENOTYPE_TABLE])])
    _write_tables(settings, tables, outputs.applied_sidecar(model, notes))
    trained_on = ("table", "ensemble", "ensemble_version", "bids_varaug", "members", "encoder")
    described = _describe_file(settings) | {
        **model.chosen,
        "augmentation": model.augmentation,
        **model.training,
        **{f"trained on: {key}": value for key, value in model.source.items() if key in trained_on},
    }
    citation = cite("applied", model=described, features=_features_text(settings, cohort))
    run = run_info(settings, cohort, notes, citation, {})
    return applied_page(run, predicted, described).write(settings.output_dir, names.GROUP_REPORT)


def _score(settings: Settings, cohort: Cohort, volumes: Cohort, notes: list[str]) -> Path:
    """Score and fit models of brain age."""
    how = {"model": settings.brainage_model, "log_volumes": settings.log_volumes}
    evaluation = _evaluate(evaluate_brain_age, settings, cohort, **how)
    numerics, compared = _numerics(settings, volumes)
    best = best_augmentation(evaluation)
    model = fit_brain_age(cohort, settings.brainage_model, best, settings.random_seed, log_volumes=settings.log_volumes)
    path = settings.output_dir / MODEL
    save_model(path, model, model_card(model, cohort, evaluation))
    predicted = outputs.evaluated_tables(evaluation)
    _note(notes, outputs.remark_ages(predicted[outputs.PHENOTYPE_TABLE]))
    _write_tables(settings, predicted, outputs.evaluated_sidecar(evaluation, notes))
    tables = {"scores": evaluation.scores, "gains": evaluation.gains, "numerics": numerics}
    tables |= {f"against_{other.name}": other.comparison for other in compared}
    for name, table in tables.items():
        if table is not None:
            write_table(table, path.with_name(f"brainage_{name}.tsv"))
    if volumes.members is not None and settings.encoder is None:
        path = settings.output_dir / variability.COVARIANCE_TABLE
        write_table(variability.numerical_covariance(volumes), path)
        write_json(outputs.covariance_sidecar(volumes), path.with_suffix(".json"))
    citation = cite(
        "group", settings=evaluation.settings, features=_features_text(settings, cohort),
        has_numerics=numerics is not None, has_reliability=not evaluation.reliability.empty,
        compared_with=[other.name for other in compared],
    )  # fmt: skip
    if not np.isfinite(cohort.age).all():
        notes.append("Some people have no age: they count for numerics, not for the model.")
    run = run_info(settings, cohort, notes, citation, evaluation.settings)
    return evaluation_page(run, evaluation, numerics, compared).write(settings.output_dir, names.GROUP_REPORT)


def _numerics(settings: Settings, cohort: Cohort) -> tuple[pd.DataFrame | None, list[ComparedPipeline]]:
    """Numerical against anatomical spread of each feature; of other pipelines beside it."""
    if cohort.members is None or settings.encoder is not None:
        return None, []
    known: dict[str, dict[str, float]] = {}
    if settings.features_table is None:
        observations = cohort.people.set_index("observation")["participant_id"].to_dict()
        known = summarise_regions(settings.output_dir, observations)
    numerics = variability.numerical_variability(cohort, **known)
    compared = []
    for name, path in settings.compare:
        if path.suffix == ".csv":
            other = read_minimum_dice_csv(path)
        else:
            other = variability.numerical_variability(read_repeated_runs(path))
        comparison = variability.compare_pipelines(numerics, other)
        if comparison.empty:
            raise UserError(
                f"--compare {name}={path}: holds minimum Dice alone, which these features lack. Compare it with the "
                "volumes of the participant level."
            )
        compared.append(ComparedPipeline(name, other, comparison))
    return numerics, compared


def _write_tables(settings: Settings, tables: Mapping[str, pd.DataFrame], sidecar: dict[str, Any]) -> None:
    """Write phenotype tables, each with the sidecar."""
    for name, table in tables.items():
        table = with_bids_labels(table)
        path = write_table(table, settings.output_dir / name)
        source_id = {"source_id": {"Description": "participant_id as the features table has it"}}
        write_json(sidecar | (source_id if "source_id" in table else {}), path.with_suffix(".json"))


def _features_text(settings: Settings, cohort: Cohort) -> str:
    source, unit = cohort.source, f" [{cohort.unit}]" if cohort.unit else ""
    if settings.encoder is not None:
        own = source["objective"] == "segmentation-encoder"
        learnt = "of the segmentation networks" if own else f"pre-trained on {source['objective']}"
        return f"{len(cohort.names)} features of an encoder of brain images ({source['architecture']}, {learnt})"
    what = "a table of" if settings.features_table else "volumes of"
    text = f"{what} {len(cohort.names)} features{unit}"
    if source["relative_to"] != "none":
        text += f", divided by {source['relative_to']} volume"
    return text + (", volumes as natural logarithms" if source["log_volumes"] else "")


def _report_name(target: str | None) -> str:
    return names.GROUP_REPORT if target is None else f"group_target_{_plain(target)}.html"
