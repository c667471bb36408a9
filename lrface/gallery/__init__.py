"""Galleries: people enrolled by photographs, searched by photographs, and removed for good.

from lrface import load_embedder
from lrface.gallery import Gallery
with Gallery.create("staff", load_embedder("runs/mine")) as gallery:
    gallery.add({"Anna": ["anna1.jpg", "anna2.jpg"], "Ben": "ben.jpg"})
    for match in gallery.search("door.jpg", faces="all").matches:
        print(match.name or "unknown", match.candidates[0].similarity)
    gallery.remove("Anna")
"""

from lrface.gallery.faces import INDEXES, POOLINGS, Candidate
from lrface.gallery.gallery import BACKENDS, Gallery, enrol
from lrface.gallery.results import Enrolment, Match, Removal, Search, matches_text
from lrface.gallery.sources import people_in

__all__ = [
    "BACKENDS",
    "INDEXES",
    "POOLINGS",
    "Candidate",
    "Enrolment",
    "Gallery",
    "Match",
    "Removal",
    "Search",
    "enrol",
    "matches_text",
    "people_in",
]
