"""How the choice of a router is read from a call, and how a call is given another one."""
