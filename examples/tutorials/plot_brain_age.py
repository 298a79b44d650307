"""
Brain age of a cohort
=====================

The group level of ``bids_varaug`` predicts age from the volumes, and asks two questions about the
ensemble: how large is the numerical spread beside the spread between people, and does the ensemble
help as data augmentation? This tutorial runs it on the simulated cohort of ``make demo``: 12 people
who do not exist, aged 20 to 80. ``examples/make_ageing_cohort.py`` deformed the MNI152 template to
volumes drawn from charts of ageing, so their true ages are known. Their volumes come from::

    bids_varaug demo/cohort demo/cohort_derivatives participant --sloppy --n-members 5

To save time, this page starts from the volumes of that run, in ``examples/tutorials/cohort``.
"""

# %%
# The volumes
# -----------
# One row for each participant and member: the baseline ``ieee``, five members of the family ``mca``
# and five of ``seed``. Volumes are in mm³.

import json
import shutil
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from bids_varaug.cli.run import main

volumes = pd.read_table("cohort/volumes.tsv")
people = pd.read_table("cohort/participants.tsv")
volumes.iloc[:5, :5]

# %%
# Numerical against anatomical spread
# -----------------------------------
# How much do the members disagree about one person, beside how much people differ? A ratio of 0.1
# costs little. At a ratio of 0.5 the networks add a quarter of the variance that people have.

seeds = volumes[volumes["member"].str.startswith("seed")].drop(columns="member")
by_person = seeds.groupby("participant_id")
numerical = by_person.std().pow(2).mean().pow(0.5)
anatomical = by_person.mean().std()
ratio = (numerical / anatomical).sort_values()

figure, axis = plt.subplots(figsize=(7, 6), layout="constrained")
axis.barh(ratio.index, ratio, color="tab:blue")
axis.set_xlabel("numerical / anatomical standard deviation, family seed")
axis.tick_params(axis="y", labelsize=8)

# %%
# Good bars are short. Long ones belong to small structures and to those that vary little between
# people. The app computes the same with confidence intervals, see ``brainage_numerics.tsv`` below.
#
# Run the group level
# -------------------
# On your own data, give the folder of the participant level:
# ``bids_varaug BIDS_DIR OUTPUT_DIR group``. Here the volumes come from one table, so we pass it
# with ``--features-table``. The call below is the command line.

folder = Path(tempfile.mkdtemp())
bids_dir, output_dir = folder / "bids", folder / "derivatives"
bids_dir.mkdir()
shutil.copy("cohort/participants.tsv", bids_dir)
description = {"Name": "Simulated ageing heads", "BIDSVersion": "1.10.0"}
(bids_dir / "dataset_description.json").write_text(json.dumps(description))
command = f"{bids_dir} {output_dir} group -w {folder / 'work'} --relative-to brain"
table = "--features-table cohort/volumes.tsv"
exit_code = main(f"{command} {table} --brainage-model bayesian_ridge".split())

# %%
# How well is age predicted?
# --------------------------
# Predictions are out of sample: all images of a person are in one fold. Always compare the mean
# absolute error (MAE) with that of predicting the mean age for everybody.

models = output_dir / "models"
scores = pd.read_table(models / "brainage_scores.tsv", index_col="augmentation")
scores[["n", "mae", "mae_low", "mae_high", "coverage"]].round(2)

# %%
# Each dot is one person, with the 90 % prediction interval. In a good picture the dots follow the
# diagonal and nine of ten intervals cross it.

predicted = pd.read_table(output_dir / "phenotype" / "brainage.tsv")
figure, axis = plt.subplots(figsize=(5, 5), layout="constrained")
interval = [
    predicted["brain_age"] - predicted["lower"],
    predicted["upper"] - predicted["brain_age"],
]
axis.errorbar(predicted["age"], predicted["brain_age"], yerr=interval, fmt="o", capsize=2)
axis.axline((50, 50), slope=1, color="grey", linestyle="--")
axis.set(xlabel="age, years", ylabel="predicted age, years")

# %%
# Does the ensemble help?
# -----------------------
# A gain is a paired difference in MAE, positive where it helps: averaging is ``mean`` over ``none``,
# augmentation ``members`` over ``mean``. Believe in the structure of the members' noise only if
# ``members`` is better than ``jitter``, noise of the same size that knows nothing about the ensemble.

gains = pd.read_table(models / "brainage_gains.tsv", index_col=["part", "augmentation", "against"])
gains[["gain", "low", "high", "p_value", "effect"]].round(2)

# %%
# With 12 people every interval contains zero, so nothing can be said. This is the usual outcome in
# small samples, and the report says so in its headline. Open ``group_brainage.html`` for the whole
# story. :doc:`/explanation/brain-age` explains the models, and :doc:`/experiments/brain-age` has
# the results on public tables.
for path in sorted(output_dir.rglob("*.*")):
    print(path.relative_to(output_dir))
shutil.rmtree(folder)
