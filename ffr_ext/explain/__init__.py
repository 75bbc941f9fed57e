"""Which internal features tell the classes, and what they look at (Oramas, Wang, Tuytelaars, ICLR 2019, 1712.06302).

`backward_rule` changes how a gradient passes ReLUs and strided convolutions, in any eager model; `select_features`
finds the channels that tell the classes; `explain` and `average_visualizations` show what they look at; `localization`
scores a heatmap against a mask. ``import ffr_ext`` loads none of this.
"""

from .averages import Average, ReceptiveField, average_visualizations, receptive_fields
from .features import feature_vectors, select_features
from .heatmaps import Explanation, Feature, explain, explain_func
from .pictures import draw_averages, draw_explanation
from .rules import backward_rule
from .scores import Localization, localization
from .selection import Entry, Fit, Selection, Survivors

__all__ = [
    "Average",
    "Entry",
    "Explanation",
    "Feature",
    "Fit",
    "Localization",
    "ReceptiveField",
    "Selection",
    "Survivors",
    "average_visualizations",
    "backward_rule",
    "draw_averages",
    "draw_explanation",
    "explain",
    "explain_func",
    "feature_vectors",
    "localization",
    "receptive_fields",
    "select_features",
]
