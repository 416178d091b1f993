"""Fused layers and encoders of Hugging Face's models. Imported only where transformers already is."""

from . import albert, bart, bert, clip, distilbert, modernbert, mpnet, t5, vit

REPLACEMENTS: dict[type, type] = {
    **bert.REPLACEMENTS,
    **distilbert.REPLACEMENTS,
    **albert.REPLACEMENTS,
    **mpnet.REPLACEMENTS,
    **vit.REPLACEMENTS,
    **clip.REPLACEMENTS,
    **modernbert.REPLACEMENTS,
    **t5.REPLACEMENTS,
    **bart.REPLACEMENTS,
}
"""Each class that `fuse` knows here, and the class that takes its place."""
