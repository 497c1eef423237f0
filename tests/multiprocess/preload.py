"""Imported by the fork server, which swallows an ImportError: then the process that needs it says so."""

import gc

import worker

worker.load()
gc.freeze()
