"""Evaluate trained models: perplexity, use of experts, cost, speed-up factor; charts and pages.

Each command loads its model by `loading` and scores text by `perplexity`. The package `figures`
draws charts; `report` renders pages from templates.
"""
