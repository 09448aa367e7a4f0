"""The web page: a queue for one card (`jobs`), the videos made so far (`album`), a person's form (`form`), the page."""
