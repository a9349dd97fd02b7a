"""The public names, and where each is defined: imported when it is first used."""

from .capture.hook.probes import probe as probe
from .checking.check import Checked as Checked
from .checking.check import check as check
from .comparison.compare import Comparison as Comparison
from .comparison.compare import compare as compare
from .comparison.mismatch import mismatch as mismatch
from .errors import MoeInspectError as MoeInspectError
from .making import import_trace as import_trace
from .making import merge as merge
from .making import trace_model as trace_model
from .model.custom.spec import RouterSpec as RouterSpec
from .model.custom.spec import register_router as register_router
from .model.describe import describe as describe
from .public import Trace as Trace
from .public import open_trace as open_trace
from .public import report as report
from .recording import ablate as ablate
from .recording import intervene as intervene
from .recording import record as record
from .reporting.report import Report as Report
from .simulate.result import Simulation as Simulation
