"""The judges, one a module; `jobs.judge` chooses among them and knows them as `Judge`."""
