"""Typed configuration: `schema` (what there is), `loading` (files and overrides), `checks` (what needs no
cluster)."""
