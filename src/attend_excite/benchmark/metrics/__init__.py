"""What looks at a benchmark's images: each metric takes a batch at a time and gives a row an image."""

from attend_excite.benchmark.metrics.base import Metric
from attend_excite.benchmark.metrics.captions import CaptionSimilarity
from attend_excite.benchmark.metrics.clip import Clip, ClipSimilarity
from attend_excite.benchmark.metrics.detector import DetectedPresence, GenEval
from attend_excite.benchmark.metrics.presence import JudgedPresence
from attend_excite.benchmark.metrics.vqa import VqaScore

__all__ = [
    "CaptionSimilarity",
    "Clip",
    "ClipSimilarity",
    "DetectedPresence",
    "GenEval",
    "JudgedPresence",
    "Metric",
    "VqaScore",
]
