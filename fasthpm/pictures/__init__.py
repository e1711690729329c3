"""Pictures and pages for people: panels, maps of images, curves, reports, runs compared."""
