"""The intermediate representation: programs of canonical ops, weights, text form, verifier, eager runner."""
