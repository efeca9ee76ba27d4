// What llama.cpp makes of the vocabularies of GGUF files: a path a line on the standard input, for
// each a line on the standard output.

#include "llama-model-loader.h"
#include "llama-vocab.h"
#include "llama.h"

#include <cstdio>
#include <iostream>
#include <string>
#include <vector>

// Of llama.cpp's own, which would bring all models along; no file here is split.
int32_t llama_split_path(char *, size_t, const char *, int32_t, int32_t) { return 0; }
int32_t llama_split_prefix(char *, size_t, const char *, int32_t, int32_t) { return 0; }

int main() {
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    std::string path;
    while (std::getline(std::cin, path)) {
        try {
            std::vector<std::string> splits;
            llama_model_loader loader(nullptr, nullptr, nullptr, path, splits, nullptr,
                                      LLAMA_LOAD_MODE_NONE, false, true, false, nullptr, nullptr);
            llama_vocab vocabulary;
            vocabulary.load(loader, LLM_KV(loader.get_arch()));
            printf("%u\n", vocabulary.n_tokens());
        } catch (const std::exception &) {
            puts("refused");
        }
        fflush(stdout);
    }
}
