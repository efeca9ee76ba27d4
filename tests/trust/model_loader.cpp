// What llama.cpp's own loader sees in GGUF files: a path a line on the standard input, for each a line
// on the standard output. Compiled with sanitizers: a flaw in the loader ends the process.

#include "ggml.h"
#include "gguf.h"

#include <cstdint>
#include <cstdio>
#include <iostream>
#include <string>

static uint64_t sum = 0;

#ifdef READ_TOO_FAR
static const size_t more = 1; // a flaw, which the sanitizer must see
#else
static const size_t more = 0;
#endif

static void use(const void * data, size_t size) {
    for (size_t i = 0; i < size + more; i++) {
        sum = sum * 31 + static_cast<const uint8_t *>(data)[i];
    }
}

static void use(const char * text) {
    while (*text) {
        sum = sum * 31 + static_cast<uint8_t>(*text++);
    }
}

static size_t width(gguf_type type) {
    switch (type) {
        case GGUF_TYPE_UINT8: case GGUF_TYPE_INT8: case GGUF_TYPE_BOOL:      return 1;
        case GGUF_TYPE_UINT16: case GGUF_TYPE_INT16:                         return 2;
        case GGUF_TYPE_UINT32: case GGUF_TYPE_INT32: case GGUF_TYPE_FLOAT32: return 4;
        default:                                                             return 8;
    }
}

static void use_values(const gguf_context * file) {
    for (int64_t i = 0; i < gguf_get_n_kv(file); i++) {
        use(gguf_get_key(file, i));
        const gguf_type type = gguf_get_kv_type(file, i);
        if (type != GGUF_TYPE_ARRAY) {
            type == GGUF_TYPE_STRING ? use(gguf_get_val_str(file, i))
                                     : use(gguf_get_val_data(file, i), width(type));
            continue;
        }
        const gguf_type element = gguf_get_arr_type(file, i);
        const size_t count = gguf_get_arr_n(file, i);
        if (element == GGUF_TYPE_STRING) {
            for (size_t j = 0; j < count; j++) {
                use(gguf_get_arr_str(file, i, j));
            }
        } else {
            use(gguf_get_arr_data(file, i), count * width(element));
        }
    }
}

int main() {
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    std::string path;
    while (std::getline(std::cin, path)) {
        ggml_context * tensors = nullptr;
        gguf_context * file = gguf_init_from_file(path.c_str(), { true, &tensors });
        if (!file) {
            puts("refused");
            fflush(stdout);
            continue;
        }
        use_values(file);
        size_t end = 0;
        for (int64_t i = 0; i < gguf_get_n_tensors(file); i++) {
            const char * name = gguf_get_tensor_name(file, i);
            const ggml_tensor * tensor = ggml_get_tensor(tensors, name);
            GGML_ASSERT(tensor && ggml_nbytes(tensor) == gguf_get_tensor_size(file, i));
            use(name);
            use(ggml_type_name(tensor->type));
            end = gguf_get_tensor_offset(file, i) + ggml_nbytes(tensor);
        }
        printf("%lld %lld %zu %zu\n", (long long) gguf_get_n_tensors(file),
               (long long) gguf_get_n_kv(file), gguf_get_data_offset(file), end);
        fflush(stdout);
        ggml_free(tensors);
        gguf_free(file);
    }
    return sum == 42; // so that nothing is left out as unused
}
