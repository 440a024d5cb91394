"""From files, hub ids and presets to checked rows."""
