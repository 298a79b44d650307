"""How structures change over adult life, and how far people of one age differ.

Each chart is a rate of change in % per year at 20, 40, 60 and 80 years (linear in between, constant
beyond), for volumes relative to the intracranial volume, and a spread. They are round numbers that
the authors of this package chose after the shapes and sizes in the literature below; they are not
quoted from a table and are no norms. What they keep of it:

- lateral ventricles: slow growth in young adults, 2 to 3 % per year and more from 60 on [1]_ [2]_
  [3]_; the inferior horn, beside the hippocampus, is stable for longer and then grows faster [3]_;
- cortex: a steady loss of about 0.3 to 0.5 % per year through adult life [1]_ [3]_;
- cerebral white matter: a peak between 30 and 45 years, then an accelerating loss [1]_ [5]_;
- hippocampus: nearly stable until about 50, then an accelerating loss that nears 1 % per year
  [2]_ [3]_ [4]_ [5]_; the amygdala likewise, earlier and weaker;
- putamen, accumbens, thalamus: a nearly straight loss of about 0.4 to 0.7 % per year; caudate: an
  early loss that levels off late in life [2]_ [4]_;
- cerebellar cortex: 0.2 to 0.4 % per year [2]_; brain stem, pallidum, ventral diencephalon: little.

The spread is the standard deviation of the log volume between people of one age, sex and head size.
It is somewhat below that of FreeSurfer's volumes over its intracranial volume in the 1000
Functional Connectomes Project (20 to 30 years), which the errors of both and the sites add to.

References
----------
.. [1] Bethlehem et al. (2022). Brain charts for the human lifespan. Nature 604, 525-533.
       doi:10.1038/s41586-022-04554-y
.. [2] Raz et al. (2005). Regional brain changes in aging healthy adults: general trends, individual
       differences and modifiers. Cerebral Cortex 15, 1676-1689. doi:10.1093/cercor/bhi044
.. [3] Fjell et al. (2009). One-year brain atrophy evident in healthy aging. Journal of Neuroscience
       29, 15223-15231. doi:10.1523/JNEUROSCI.3252-09.2009
.. [4] Fjell et al. (2013). Critical ages in the life course of the adult brain: nonlinear
       subcortical aging. Neurobiology of Aging 34, 2239-2247.
       doi:10.1016/j.neurobiolaging.2013.04.006
.. [5] Coupe et al. (2017). Towards a unified analysis of brain maturation and aging across the
       entire lifespan. Human Brain Mapping 38, 5501-5518. doi:10.1002/hbm.23743
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

AGES = (20.0, 40.0, 60.0, 80.0)
"""Years at which a chart states its rate."""


@dataclass(frozen=True)
class Chart:
    """One structure, or one on both sides.

    Attributes
    ----------
    ids : FreeSurfer ids, left before right
    rates : change at `AGES`, % per year
    spread : SD of log volume between people, both sides together
    side_spread : SD of log volume of each side around the person's mean; 0 for midline structures
    fluid : filled with cerebrospinal fluid, so that it varies with the other ventricles
    """

    ids: tuple[int, ...]
    rates: tuple[float, float, float, float]
    spread: float
    side_spread: float = 0.0
    fluid: bool = False


CHARTS: tuple[Chart, ...] = (
    Chart((2, 41), (0.35, 0.05, -0.3, -0.8), 0.05, 0.01),  # cerebral white matter
    Chart((3, 42), (-0.35, -0.3, -0.35, -0.5), 0.05, 0.01),  # cerebral cortex
    Chart((4, 43), (0.8, 1.3, 2.2, 3.0), 0.33, 0.12, fluid=True),  # lateral ventricle
    Chart((5, 44), (0.2, 0.6, 2.0, 3.5), 0.28, 0.15, fluid=True),  # its inferior horn
    Chart((7, 46), (0.1, 0.0, -0.3, -0.6), 0.08, 0.02),  # cerebellar white matter
    Chart((8, 47), (-0.15, -0.2, -0.3, -0.4), 0.08, 0.015),  # cerebellar cortex
    Chart((10, 49), (-0.3, -0.3, -0.4, -0.5), 0.07, 0.025),  # thalamus
    Chart((11, 50), (-0.4, -0.4, -0.2, 0.0), 0.1, 0.025),  # caudate
    Chart((12, 51), (-0.5, -0.5, -0.6, -0.6), 0.1, 0.02),  # putamen
    Chart((13, 52), (-0.1, -0.15, -0.25, -0.3), 0.09, 0.04),  # pallidum
    Chart((14,), (0.5, 1.0, 1.8, 2.2), 0.22, fluid=True),  # third ventricle
    Chart((15,), (0.0, 0.1, 0.3, 0.4), 0.2, fluid=True),  # fourth ventricle
    Chart((16,), (0.1, 0.0, -0.1, -0.2), 0.08),  # brain stem
    Chart((17, 53), (0.05, -0.1, -0.5, -1.1), 0.08, 0.03),  # hippocampus
    Chart((18, 54), (-0.05, -0.15, -0.5, -0.8), 0.09, 0.05),  # amygdala
    Chart((26, 58), (-0.5, -0.5, -0.7, -0.8), 0.13, 0.06),  # accumbens
    Chart((28, 60), (0.0, -0.1, -0.2, -0.3), 0.07, 0.025),  # ventral diencephalon
)


def expected_ratio(chart: Chart, age: float, template_age: float) -> float:
    """Volume at an age relative to that at the template's age, head size kept.

    Parameters
    ----------
    chart : Chart
    age, template_age : years

    Returns
    -------
    float, exp of the integral of the rate over age

    Examples
    --------
    >>> expected_ratio(CHARTS[0], 30.0, 30.0)
    1.0
    >>> ventricle = CHARTS[2]
    >>> 2.0 < expected_ratio(ventricle, 75.0, 25.0) < 3.0
    True
    """
    low, high = sorted((age, template_age))
    knots = np.array([low, *(knot for knot in AGES if low < knot < high), high])
    rates = np.interp(knots, AGES, chart.rates) / 100
    growth = float(np.sum(np.diff(knots) * (rates[1:] + rates[:-1]) / 2))
    return float(np.exp(growth if age >= template_age else -growth))
