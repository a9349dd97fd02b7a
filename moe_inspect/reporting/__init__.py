"""Reports on a trace: tables, verdict, charts, and how they are shown."""
