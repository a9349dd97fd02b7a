"""The public names, and where each is defined: imported when it is first used."""

from .api import ablate as ablate
from .api import intervene as intervene
from .api import record as record
from .api import trace_model as trace_model
from .capture.hook.probes import probe as probe
from .checking.check import Checked as Checked
from .checking.check import check as check
from .comparison.compare import Comparison as Comparison
from .comparison.compare import compare as compare
from .comparison.mismatch import mismatch as mismatch
from .errors import MoeInspectError as MoeInspectError
from .importers.run import import_trace as import_trace
from .model.custom.spec import RouterSpec as RouterSpec
from .model.custom.spec import register_router as register_router
from .model.describe import describe as describe
from .reporting.report import Report as Report
from .reporting.report import report as report
from .simulate.result import Simulation as Simulation
from .trace.merge import merge as merge
from .trace.reader import Trace as Trace
from .trace.reader import open_trace as open_trace
