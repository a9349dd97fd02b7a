"""The public names, and where each is defined: imported when it is first used."""

from .actions import Webhook as Webhook
from .audit import LossAudit as LossAudit
from .audit import audit_loss as audit_loss
from .callback import RoutingCallback as RoutingCallback
from .lightning import LightningRoutingCallback as LightningRoutingCallback
from .monitor import DEFAULT_RULES as DEFAULT_RULES
from .monitor import Alarm as Alarm
from .monitor import RoutingMonitor as RoutingMonitor
