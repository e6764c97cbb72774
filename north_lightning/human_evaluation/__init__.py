"""Human evaluation: people rate attempts of two or more models without knowing whose they are.

    prepare -> study folder -> serve -> ratings.sqlite -> report

``prepare`` reads attempts of any harness (``submissions``), removes the models' names (``names``), and decides who
rates what on which side (``assignments``). ``serve`` shows pages to raters and stores what they say; it knows no
model. ``report`` opens the seal and computes (``measures``).
"""
