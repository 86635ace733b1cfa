"""The privacy conformance suite on sites: `lab` and `secure_lab` run sites to be checked."""
