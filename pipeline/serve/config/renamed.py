"""Options that llama-server once had, and what stands for them now.

Read from `common/arg.cpp` of the pinned llama.cpp and its history; a test holds the table against
the real program. The `--help` of the program that will run decides: a name that it still has is not
looked up here.
"""

RENAMED = {
    "mmap": "load_mode",
    "no-mmap": "load_mode",
    "mlock": "load_mode",
    "direct-io": "load_mode",
    "no-direct-io": "load_mode",
    "draft": "spec_draft_n_max",
    "draft-n": "spec_draft_n_max",
    "draft-max": "spec_draft_n_max",
    "draft-min": "spec_draft_n_min",
    "draft-n-min": "spec_draft_n_min",
    "spec-ngram-size-n": "spec_ngram_mod_n_match",
    "spec-ngram-size-m": "spec_ngram_simple_size_m",
    "spec-ngram-min-hits": "spec_ngram_simple_min_hits",
}
