"""Reports on trained models: which expert takes what, figures as SVG, self-contained pages."""
