"""What of a run a participant's report shows."""

from pathlib import Path

from bids_varaug.reports.subject import _shown_settings
from bids_varaug.settings import Settings


def test_settings_of_the_group_level_are_not_shown():
    shown = _shown_settings(Settings(Path("/data"), Path("/out"), "participant", Path("/work")))
    assert "members" in shown and not {"age_column", "brainage_model", "cv_folds"} & set(shown)
