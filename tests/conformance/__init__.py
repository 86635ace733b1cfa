"""The privacy conformance suite: `suite` checks any per-unit gradient, `lab` runs sites to be checked."""
