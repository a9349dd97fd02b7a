"""Files read by several processes at once, with the result of one."""
