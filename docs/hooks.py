"""What the site build adds to the pages: equations as MathML, so that nothing is loaded from elsewhere."""
