"""medaug: labelled medical images, generated, checked and measured.

Heavy libraries are imported where they are used, so that ``medaug --help`` stays quick.
"""

__version__ = "0.1.0"
# (0002,0012) of every DICOM file that medaug writes, and its name on the network; from a UUID (PS3.5 B.2)
__implementation_uid__ = "2.25.132658771550492271542143490856914497503"
