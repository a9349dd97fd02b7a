"""The command line: one file a command, each a thin caller of a public function. Only here is typer
imported."""
