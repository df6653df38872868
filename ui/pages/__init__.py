"""The pages of the workbench. Each module has ``build(app, shell)``, which fills its tab."""
