"""From a head to a template's space and back: affine, diffeomorphism, their files, and their spread over members."""
