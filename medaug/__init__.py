"""medaug: labelled medical images, generated, checked and measured.

Heavy libraries are imported where they are used, so that ``medaug --help`` stays quick.
"""

__version__ = "0.1.0"
