"""
Segment one image in Python
===========================

One T1w image and five lines give labels, volumes, and a measure of how far each can be trusted.
This tutorial segments the MNI152 template that nilearn carries, and looks at each result.
"""

# %%
# Five lines
# ----------
# :func:`~bids_varaug.segment` takes the path of a NIfTI file or a nibabel image. ``members="seed"``
# chooses the networks that differ by their random seed: judge a segmentation by this family.
#
# ``sloppy=True`` works on a 2 mm grid, which takes seconds. Use it to try things, not for results.

from nilearn.datasets import load_mni152_template

from bids_varaug import segment

t1w = load_mni152_template(resolution=2)
result = segment(t1w, members="seed", n_members=5, sloppy=True)
result

# %%
# Look at the labels
# ------------------
# The consensus is the label with the largest mean posterior. It has the grid of the input image, so
# you can overlay both in any viewer. In a good picture the contours follow the tissue borders.

figure = result.plot()

# %%
# Volumes
# -------
# One row for each structure, one column for each member, in mm³.

result.volumes.head(10)

# %%
# How far can they be trusted?
# ----------------------------
# ``regions`` has one row for each structure: mean and standard deviation over the members, their
# coefficient of variation, the Dice overlap to be expected with labels that an expert draws, and a
# verdict with its reason. Five members are the fewest that allow the verdict ``good``.

columns = ["volume_mean", "volume_std", "cv", "expected_dice", "verdict", "reason"]
result.regions[columns].sort_values("expected_dice").head(8)

# %%
# The structures at the top are the ones to look at first. ``result.warnings`` says the same in
# sentences.

for warning in result.warnings:
    print("-", warning)

# %%
# Where may the labels be wrong?
# ------------------------------
# ``uncertainty`` is the entropy of the members' mean posterior in bit: 0 where the label is sure, 1
# where two labels are equally probable. ``unreliable`` marks the voxels whose label is wrong with a
# probability of 0.37 or more. Both are nibabel images, so nilearn can plot them. A good map shows
# lines along borders; filled patches mean that a whole region is in doubt. ``entropy`` shows what
# members vote differently on.

from nilearn.plotting import plot_stat_map

axial = {"display_mode": "z", "cut_coords": (-30, -12, 6, 24)}
display = plot_stat_map(result.uncertainty, bg_img=t1w, cmap="inferno", vmin=0, vmax=2, **axial)

# %%
# What share of the brain is unreliable?

brain = result.labels.get_fdata() > 0
unreliable = result.unreliable.get_fdata() > 0
print(f"{unreliable[brain].mean():.1%} of the voxels of the brain")

# %%
# Save
# ----
# ``save`` writes images and tables with their sidecars, as the app does. ``report=True`` adds the
# HTML report that :doc:`/tutorials/first-report` explains. The folder must be new or empty.

import tempfile
from pathlib import Path

folder = Path(tempfile.mkdtemp()) / "derivatives"
for path in result.save(folder, report=True):
    print(path.relative_to(folder))

# %%
# From the shell, the same is ``bids_varaug-segment T1w.nii.gz OUT_DIR --report``. For a BIDS
# dataset use ``bids_varaug``, see :doc:`/tutorials/getting-started`.
