"""The privacy audit: attacks on what a run releases, held against the guarantee that it claims."""
