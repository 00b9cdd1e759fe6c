"""The way to and from a PACS: receive, retrieve and send over DICOM (PS3.7, PS3.8) and DICOMweb (PS3.18).

The room needs the extra `pacs` (pynetdicom, dicomweb-client), which is imported only when a command runs.
"""
