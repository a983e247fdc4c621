"""From scored runs to a threshold that holds on prompts it has not seen, and to figures that say how well."""
