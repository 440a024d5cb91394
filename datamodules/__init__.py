"""Lightning datamodules: safety prompts, general-capability text, and the module that holds both."""
