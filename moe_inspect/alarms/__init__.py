"""Alarms: rules on the load of routers, such as `max_vio>2`, judged window by window while a model
trains or serves, and on a finished trace.

May import: analysis, errors, files, text, trace.
"""
