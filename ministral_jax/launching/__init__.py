"""Jobs for schedulers: one typed description each, one renderer each, the templates in `launch/`."""
