"""Alarms: rules on the load of routers, judged window by window, in training or after the fact."""
