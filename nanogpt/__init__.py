"""The modded-NanoGPT speedrun: a GPT-2-small-scale model trained to 3.28 validation loss on FineWeb.

Importing this package touches no device, no environment variable and no file.
"""

__version__ = "0.2.0"
