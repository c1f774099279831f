"""The configuration of a run and of a site: what keys there are, and how files become values.

`schema.Config` is a run's configuration and `site.SiteConfig` a site's; `loading` reads files,
`template` writes them, and `names` knows the methods and other names to choose from. Callers
import from the module that owns a name. Nothing here imports PyTorch.
"""
