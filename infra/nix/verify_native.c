/*
 * Verification of one derivation, as infra/nix/verify.py does it: for the children that verify, and only where this
 * was compiled (`./run compile`).
 *
 * Rules:
 *  1. It takes what Nix commonly writes and what is true, and nothing else. For any other bytes `verify` returns None,
 *     and verify.py decides: it alone knows what is wrong and has the words for it.
 *  2. The bytes are a stranger's. Every read stands behind a comparison with the end of what is read, every write goes
 *     through `append` and `add`, which grow what they write to. Nothing recurses, no length is taken from the bytes.
 *  3. All that is put into JSON is printable ASCII without quote and backslash, so that it is its own escape.
 *  4. SHA-256 is hashlib's: OpenSSL knows the processor.
 *
 * A "record" is what those above a derivation need of it, as bytes: its hash modulo in base 16, a letter for its kind
 * (`f` fixed, `i` input-addressed), then name, NUL, path and NUL of each output.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

/* As infra/nix/canonical.py: a longer text goes the way that cuts it into pieces. */
#define MAX_BYTES (1024 * 1024)
#define HASH_PART 32
#define MAX_NAME 211
#define DIGEST 32
#define HEX (2 * DIGEST)
#define SUFFIX ".drv"
#define LENGTH(text) ((Py_ssize_t)sizeof(text) - 1)

/* --- Slices, lists of them, and texts that grow --- */

typedef struct {
    const char *at;
    Py_ssize_t size;
} Slice;

typedef struct {
    Slice *items;
    size_t count, room;
} Slices;

typedef struct {
    char *at;
    size_t size, room;
} Text;

static bool grow(void **at, size_t *room, size_t wanted, size_t unit) {
    if (wanted <= *room)
        return true;
    size_t larger = *room ? *room * 2 : 64;
    while (larger < wanted)
        larger *= 2;
    void *moved = realloc(*at, larger * unit);
    if (!moved)
        return false;
    *at = moved;
    *room = larger;
    return true;
}

static bool add(Slices *list, Slice item) {
    if (!grow((void **)&list->items, &list->room, list->count + 1, sizeof(Slice)))
        return false;
    list->items[list->count++] = item;
    return true;
}

static bool append(Text *text, const char *at, Py_ssize_t size) {
    if (size < 0 || !grow((void **)&text->at, &text->room, text->size + (size_t)size, 1))
        return false;
    if (size)
        memcpy(text->at + text->size, at, (size_t)size);
    text->size += (size_t)size;
    return true;
}

#define SAY(text, literal) append(text, literal, LENGTH(literal))
#define PUT(text, slice) append(text, (slice).at, (slice).size)

static int compare(Slice a, Slice b) {
    int order = memcmp(a.at, b.at, (size_t)(a.size < b.size ? a.size : b.size));
    return order ? order : (a.size > b.size) - (a.size < b.size);
}

static int compare_items(const void *a, const void *b) { return compare(*(const Slice *)a, *(const Slice *)b); }

static bool is(Slice slice, const char *text) {
    return (size_t)slice.size == strlen(text) && !memcmp(slice.at, text, (size_t)slice.size);
}

static bool rising(const Slices *list) {
    for (size_t i = 1; i < list->count; i++)
        if (compare(list->items[i - 1], list->items[i]) >= 0)
            return false;
    return true;
}

static void sort_unique(Slices *list) {
    if (!list->count)
        return;
    qsort(list->items, list->count, sizeof(Slice), compare_items);
    size_t kept = 1;
    for (size_t i = 1; i < list->count; i++)
        if (compare(list->items[kept - 1], list->items[i]))
            list->items[kept++] = list->items[i];
    list->count = kept;
}

/* --- Store paths --- */

static bool is_digit(unsigned char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z' && c != 'e' && c != 'o' && c != 't' && c != 'u');
}

static bool is_name(Slice name) {
    if (name.size < 1 || name.size > MAX_NAME)
        return false;
    for (Py_ssize_t i = 0; i < name.size; i++) {
        unsigned char c = (unsigned char)name.at[i];
        bool letter = (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z');
        /* memchr of a literal would find its NUL. */
        if (!letter && c != '+' && c != '-' && c != '.' && c != '_' && c != '?' && c != '=')
            return false;
    }
    if (name.at[0] != '.')
        return true;
    Py_ssize_t dots = name.size > 1 && name.at[1] == '.' ? 2 : 1;
    return name.size > dots && name.at[dots] != '-';
}

/* `<hash part>-<name>` */
static bool is_base(Slice base) {
    if (base.size <= HASH_PART + 1 || base.at[HASH_PART] != '-')
        return false;
    for (int i = 0; i < HASH_PART; i++)
        if (!is_digit((unsigned char)base.at[i]))
            return false;
    return is_name((Slice){base.at + HASH_PART + 1, base.size - HASH_PART - 1});
}

/* The base name in `path`, if it lies in the store directory. */
static bool base_of(Slice store, Slice path, Slice *base) {
    if (path.size <= store.size + 1 || memcmp(path.at, store.at, (size_t)store.size) || path.at[store.size] != '/')
        return false;
    *base = (Slice){path.at + store.size + 1, path.size - store.size - 1};
    return true;
}

/* --- Hashes --- */

static PyObject *sha256_of;
static PyObject *digest_name;

static bool sha256(const Text *text, unsigned char digest[DIGEST]) {
    PyObject *bytes = PyBytes_FromStringAndSize(text->at, (Py_ssize_t)text->size);
    PyObject *hash = bytes ? PyObject_CallFunctionObjArgs(sha256_of, bytes, NULL) : NULL;
    PyObject *result = hash ? PyObject_CallMethodObjArgs(hash, digest_name, NULL) : NULL;
    char *at;
    Py_ssize_t size;
    bool done = result && PyBytes_AsStringAndSize(result, &at, &size) == 0 && size == DIGEST;
    if (done)
        memcpy(digest, at, DIGEST);
    Py_XDECREF(result);
    Py_XDECREF(hash);
    Py_XDECREF(bytes);
    return done;
}

static void base16(const unsigned char digest[DIGEST], char hex[HEX]) {
    for (int i = 0; i < DIGEST; i++) {
        hex[2 * i] = "0123456789abcdef"[digest[i] >> 4];
        hex[2 * i + 1] = "0123456789abcdef"[digest[i] & 15];
    }
}

/* Whether `path` is what `TYPE:sha256:INNER:STORE:NAME` gives; `text` holds TYPE. */
static bool path_holds(Text *text, const char inner[HEX], Slice store, Slice name, Slice path) {
    unsigned char digest[DIGEST];
    char part[HASH_PART];
    if (!SAY(text, ":sha256:") || !append(text, inner, HEX) || !SAY(text, ":") || !PUT(text, store) ||
        !SAY(text, ":") || !PUT(text, name) || !sha256(text, digest))
        return false;
    for (int i = 20; i < DIGEST; i++)
        digest[i - 20] ^= digest[i];
    for (int i = 0; i < HASH_PART; i++) {
        /* Digit i has the five bits from this one on, and the first digit is the highest. */
        int bit = 5 * (HASH_PART - 1 - i), byte = bit / 8;
        unsigned two = digest[byte] | (byte + 1 < 20 ? (unsigned)digest[byte + 1] << 8 : 0);
        part[i] = "0123456789abcdfghijklmnpqrsvwxyz"[(two >> (bit % 8)) & 31];
    }
    Slice base;
    return base_of(store, path, &base) && base.size == HASH_PART + 1 + name.size && !memcmp(base.at, part, HASH_PART) &&
           base.at[HASH_PART] == '-' && !memcmp(base.at + HASH_PART + 1, name.at, (size_t)name.size);
}

/* --- The text --- */

typedef struct {
    const char *at, *end;
} Reader;

static bool take(Reader *reader, const char *token, Py_ssize_t size) {
    if (reader->end - reader->at < size || memcmp(reader->at, token, (size_t)size))
        return false;
    reader->at += size;
    return true;
}

#define TAKE(reader, literal) take(reader, literal, LENGTH(literal))

/* A string that is its own text, here and in JSON. */
static bool take_plain(Reader *reader, Slice *string) {
    if (!TAKE(reader, "\""))
        return false;
    const char *start = reader->at;
    for (; reader->at < reader->end; reader->at++) {
        unsigned char c = (unsigned char)*reader->at;
        if (c == '"') {
            *string = (Slice){start, reader->at++ - start};
            return true;
        }
        if (c < ' ' || c > '~' || c == '\\')
            return false;
    }
    return false;
}

/* Any string that is escaped as Nix escapes. */
static bool take_string(Reader *reader, Slice *string, bool *escaped) {
    if (!TAKE(reader, "\""))
        return false;
    const char *start = reader->at;
    *escaped = false;
    for (; reader->at < reader->end; reader->at++) {
        unsigned char c = (unsigned char)*reader->at;
        /* Most characters. */
        if (c > '\\' || (c > '"' && c < '\\'))
            continue;
        if (c == '"') {
            *string = (Slice){start, reader->at++ - start};
            return true;
        }
        if (c == '\n' || c == '\r' || c == '\t')
            return false;
        if (c == '\\') {
            *escaped = true;
            reader->at++;
            if (reader->at == reader->end)
                return false;
            c = (unsigned char)*reader->at;
            if (c != 'n' && c != 'r' && c != 't' && c != '"' && c != '\\')
                return false;
        }
    }
    return false;
}

/* Plain strings up to the bracket, which may be none. */
static bool take_list(Reader *reader, Slices *list) {
    if (TAKE(reader, "]"))
        return true;
    do {
        Slice string;
        if (!take_plain(reader, &string) || !add(list, string))
            return false;
    } while (TAKE(reader, ","));
    return TAKE(reader, "]");
}

typedef struct {
    Slice name, path, algo, hash;
    /* Its value in the environment; NULL where it has none. */
    Slice value;
} Output;

/* More outputs than anyone has; they are looked up one by one. */
#define MAX_OUTPUTS 32

typedef struct {
    Output outputs[MAX_OUTPUTS];
    size_t output_count;
    /* Paths of input derivations; where the names of each begin in `names`, with one more for the end. */
    Slices inputs, names, sources;
    Text starts;
    Slice system, builder, features;
    /* Inside the brackets of the input derivations. */
    const char *inputs_start, *inputs_end;
    /* Of what is hashed or made. */
    Text work;
    Slices paths, entries;
    Text modulos, text, detail, found;
} Drv;

static size_t names_start(const Drv *drv, size_t input) {
    size_t start;
    memcpy(&start, drv->starts.at + input * sizeof start, sizeof start);
    return start;
}

static bool mark_names(Drv *drv) {
    size_t start = drv->names.count;
    return append(&drv->starts, (const char *)&start, sizeof start);
}

static bool read_outputs(Reader *reader, Drv *drv) {
    do {
        if (drv->output_count == MAX_OUTPUTS)
            return false;
        Output *output = &drv->outputs[drv->output_count];
        if (!TAKE(reader, "(") || !take_plain(reader, &output->name) || !TAKE(reader, ",") ||
            !take_plain(reader, &output->path) || !TAKE(reader, ",") || !take_plain(reader, &output->algo) ||
            !TAKE(reader, ",") || !take_plain(reader, &output->hash) || !TAKE(reader, ")"))
            return false;
        if (drv->output_count && compare(output[-1].name, output->name) >= 0)
            return false;
        drv->output_count++;
    } while (TAKE(reader, ","));
    return TAKE(reader, "]");
}

static bool read_inputs(Reader *reader, Drv *drv) {
    drv->inputs_start = drv->inputs_end = reader->at;
    if (TAKE(reader, "]"))
        return mark_names(drv);
    do {
        Slice path;
        size_t before = drv->names.count;
        if (!mark_names(drv) || !TAKE(reader, "(") || !take_plain(reader, &path) || !add(&drv->inputs, path) ||
            !TAKE(reader, ",[") || !take_list(reader, &drv->names) || !TAKE(reader, ")") ||
            drv->names.count == before)
            return false;
        for (size_t i = before + 1; i < drv->names.count; i++)
            if (compare(drv->names.items[i - 1], drv->names.items[i]) >= 0)
                return false;
    } while (TAKE(reader, ","));
    drv->inputs_end = reader->at;
    return TAKE(reader, "]") && mark_names(drv);
}

static bool read_environment(Reader *reader, Drv *drv) {
    Slice last = {NULL, 0};
    do {
        Slice key, value;
        bool escaped_key, escaped_value;
        if (!TAKE(reader, "(") || !take_string(reader, &key, &escaped_key) || !TAKE(reader, ",") ||
            !take_string(reader, &value, &escaped_value) || !TAKE(reader, ")"))
            return false;
        /* Escaped keys order otherwise than the keys themselves; options in JSON are read elsewhere. */
        if (escaped_key || (last.at && compare(last, key) >= 0) || is(key, "__json"))
            return false;
        last = key;
        if (is(key, "requiredSystemFeatures"))
            drv->features = value;
        for (size_t i = 0; i < drv->output_count; i++)
            if (!compare(key, drv->outputs[i].name))
                drv->outputs[i].value = value;
    } while (TAKE(reader, ","));
    return TAKE(reader, "])");
}

/* Whether the text is read, and one that Nix would have written so. */
static bool read_drv(Drv *drv, Slice data) {
    Reader reader = {data.at, data.at + data.size};
    Slice argument;
    bool escaped;
    if (data.size > MAX_BYTES || !TAKE(&reader, "Derive([") || !read_outputs(&reader, drv) || !TAKE(&reader, ",[") ||
        !read_inputs(&reader, drv) || !TAKE(&reader, ",[") || !take_list(&reader, &drv->sources) ||
        !TAKE(&reader, ",") || !take_plain(&reader, &drv->system) || !TAKE(&reader, ",") ||
        !take_plain(&reader, &drv->builder) || !TAKE(&reader, ",["))
        return false;
    if (!TAKE(&reader, "]")) {
        do {
            if (!take_string(&reader, &argument, &escaped))
                return false;
        } while (TAKE(&reader, ","));
        if (!TAKE(&reader, "]"))
            return false;
    }
    return TAKE(&reader, ",[") && read_environment(&reader, drv) && reader.at == reader.end && rising(&drv->inputs) &&
           rising(&drv->sources);
}

/* --- What follows from it --- */

/* The path of an output in a record. */
static bool find_output(Slice record, Slice name, Slice *path) {
    const char *at = record.at + HEX + 1, *end = record.at + record.size;
    while (at < end) {
        const char *stop = memchr(at, 0, (size_t)(end - at));
        const char *last = stop ? memchr(stop + 1, 0, (size_t)(end - stop - 1)) : NULL;
        if (!last)
            return false;
        if (!compare((Slice){at, stop - at}, name)) {
            *path = (Slice){stop + 1, last - stop - 1};
            return path->size > 0;
        }
        at = last + 1;
    }
    return false;
}

/*
 * Find all inputs: their paths into `paths`, which point into records, so `held` keeps these; and their modulos, as
 * entries of the text that is hashed.
 */
static bool resolve(Drv *drv, Slice store, PyObject *known, PyObject *held) {
    for (size_t i = 0; i < drv->sources.count; i++) {
        Slice base;
        if (!base_of(store, drv->sources.items[i], &base) || !is_base(base) || !add(&drv->paths, drv->sources.items[i]))
            return false;
    }
    for (size_t i = 0; i < drv->inputs.count; i++) {
        Slice base, record, path;
        if (!base_of(store, drv->inputs.items[i], &base))
            return false;
        PyObject *key = PyUnicode_FromStringAndSize(base.at, base.size);
        PyObject *found = key ? PyDict_GetItemWithError(known, key) : NULL;
        Py_XDECREF(key);
        char *at;
        if (!found || PyList_Append(held, found) || PyBytes_AsStringAndSize(found, &at, &record.size) || record.size <= HEX)
            return false;
        record.at = at;
        for (size_t n = names_start(drv, i); n < names_start(drv, i + 1); n++)
            if (!find_output(record, drv->names.items[n], &path) || !add(&drv->paths, path))
                return false;
        /* An entry is the modulo and the number of its input, until it is sorted. */
        if (!append(&drv->modulos, record.at, HEX) || !append(&drv->modulos, (const char *)&i, sizeof i))
            return false;
    }
    sort_unique(&drv->paths);
    return true;
}

static bool same_names(const Drv *drv, size_t a, size_t b) {
    size_t first = names_start(drv, a), second = names_start(drv, b), count = names_start(drv, a + 1) - first;
    if (names_start(drv, b + 1) - second != count)
        return false;
    for (size_t i = 0; i < count; i++)
        if (compare(drv->names.items[first + i], drv->names.items[second + i]))
            return false;
    return true;
}

/* The input derivations with modulos for paths, sorted; those of one modulo are one. */
static bool write_inputs(Drv *drv) {
    const size_t unit = HEX + sizeof(size_t);
    for (size_t i = 0; i < drv->inputs.count; i++)
        if (!add(&drv->entries, (Slice){drv->modulos.at + i * unit, (Py_ssize_t)unit}))
            return false;
    if (drv->entries.count)
        qsort(drv->entries.items, drv->entries.count, sizeof(Slice), compare_items);
    size_t before = 0;
    for (size_t i = 0; i < drv->entries.count; i++) {
        Slice entry = drv->entries.items[i];
        size_t input;
        memcpy(&input, entry.at + HEX, sizeof input);
        if (i && !memcmp(drv->entries.items[i - 1].at, entry.at, HEX)) {
            if (!same_names(drv, before, input))
                return false;
            continue;
        }
        before = input;
        if (!append(&drv->text, ",(\"", i ? 3 : 0) || (!i && !SAY(&drv->text, "(\"")) ||
            !append(&drv->text, entry.at, HEX) || !SAY(&drv->text, "\",["))
            return false;
        for (size_t n = names_start(drv, input); n < names_start(drv, input + 1); n++)
            if ((n > names_start(drv, input) && !SAY(&drv->text, ",")) || !SAY(&drv->text, "\"") ||
                !PUT(&drv->text, drv->names.items[n]) || !SAY(&drv->text, "\""))
                return false;
        if (!SAY(&drv->text, "])"))
            return false;
    }
    return true;
}

static bool own_path_holds(Drv *drv, Slice store, Slice base, Slice data) {
    unsigned char digest[DIGEST];
    char hex[HEX];
    size_t input = 0, source = 0;
    Text *work = &drv->work;
    work->size = 0;
    if (!PUT(work, data) || !sha256(work, digest))
        return false;
    base16(digest, hex);
    work->size = 0;
    if (!SAY(work, "text"))
        return false;
    /* Both rise, so the smaller of the next two is the next reference. */
    while (input < drv->inputs.count || source < drv->sources.count) {
        int order = input == drv->inputs.count     ? 1
                    : source == drv->sources.count ? -1
                                                   : compare(drv->inputs.items[input], drv->sources.items[source]);
        Slice next = order <= 0 ? drv->inputs.items[input] : drv->sources.items[source];
        input += order <= 0;
        source += order >= 0;
        if (!SAY(work, ":") || !PUT(work, next))
            return false;
    }
    Slice name = {base.at + HASH_PART + 1, base.size - HASH_PART - 1};
    Text path = {NULL, 0, 0};
    bool holds = PUT(&path, store) && SAY(&path, "/") && PUT(&path, base) &&
                 path_holds(work, hex, store, name, (Slice){path.at, (Py_ssize_t)path.size});
    free(path.at);
    return holds;
}

/* `<name>` or `<name>-<output>` into `text`. */
static bool name_of(Text *text, Slice name, Slice output) {
    text->size = 0;
    return PUT(text, name) && (is(output, "out") || (SAY(text, "-") && PUT(text, output))) && is_name(output) &&
           is_name((Slice){text->at, (Py_ssize_t)text->size});
}

static bool is_base16(Slice text) {
    for (Py_ssize_t i = 0; i < text.size; i++)
        if (!((text.at[i] >= '0' && text.at[i] <= '9') || (text.at[i] >= 'a' && text.at[i] <= 'f')))
            return false;
    return true;
}

/* A fixed output: its path, and the modulo. */
static bool fixed_holds(Drv *drv, Slice store, Slice name, unsigned char modulo[DIGEST]) {
    static const struct {
        const char *name;
        Py_ssize_t size;
    } algorithms[] = {{"md5", 16}, {"sha1", 20}, {"sha256", 32}, {"sha512", 64}};
    const Output *output = &drv->outputs[0];
    bool recursive = output->algo.size > 2 && !memcmp(output->algo.at, "r:", 2), known = false;
    Slice algo = {output->algo.at + (recursive ? 2 : 0), output->algo.size - (recursive ? 2 : 0)};
    for (size_t i = 0; i < sizeof algorithms / sizeof *algorithms; i++)
        known = known || (is(algo, algorithms[i].name) && output->hash.size == 2 * algorithms[i].size);
    if (!known || !is_base16(output->hash) || drv->output_count != 1 || !is(output->name, "out"))
        return false;
    unsigned char digest[DIGEST];
    char inner[HEX];
    Text *work = &drv->work;
    work->size = 0;
    bool source = recursive && is(algo, "sha256");
    if (source) {
        memcpy(inner, output->hash.at, HEX);
    } else {
        if (!SAY(work, "fixed:out:") || !PUT(work, output->algo) || !SAY(work, ":") || !PUT(work, output->hash) ||
            !SAY(work, ":") || !sha256(work, digest))
            return false;
        base16(digest, inner);
    }
    work->size = 0;
    if (!(source ? SAY(work, "source") : SAY(work, "output:out")) ||
        !path_holds(work, inner, store, name, output->path))
        return false;
    work->size = 0;
    if (!SAY(work, "fixed:out:") || !PUT(work, output->algo) || !SAY(work, ":") || !PUT(work, output->hash) ||
        !SAY(work, ":") || !PUT(work, output->path) || !sha256(work, modulo))
        return false;
    return true;
}

/* The rest of the text behind the input derivations, without the values of variables that are named after outputs. */
static bool put_masked_rest(Drv *drv, Slice data) {
    const char *at = drv->inputs_end, *end = data.at + data.size;
    while (true) {
        /* The next of them: keys rise, so values stand in the order of their names, as outputs do. */
        const Slice *next = NULL;
        for (size_t i = 0; i < drv->output_count; i++)
            if (drv->outputs[i].value.at >= at && (!next || drv->outputs[i].value.at < next->at))
                next = &drv->outputs[i].value;
        if (!next)
            return append(&drv->work, at, end - at);
        if (!append(&drv->work, at, next->at - at))
            return false;
        /* The quote behind it, so that an empty value does not stand there again. */
        at = next->at + next->size;
        if (!append(&drv->work, at, 1))
            return false;
        at++;
    }
}

/* Input-addressed outputs: their paths, and the modulo. */
static bool addressed_hold(Drv *drv, Slice store, Slice name, Slice data, unsigned char modulo[DIGEST]) {
    unsigned char digest[DIGEST];
    char masked[HEX];
    Text *work = &drv->work;
    if (!write_inputs(drv))
        return false;
    work->size = 0;
    if (!append(work, data.at, drv->inputs_start - data.at) || !append(work, drv->text.at, (Py_ssize_t)drv->text.size) ||
        !append(work, drv->inputs_end, data.at + data.size - drv->inputs_end) || !sha256(work, modulo))
        return false;
    work->size = 0;
    if (!SAY(work, "Derive(["))
        return false;
    for (size_t i = 0; i < drv->output_count; i++)
        if ((i && !SAY(work, ",")) || !SAY(work, "(\"") || !PUT(work, drv->outputs[i].name) ||
            !SAY(work, "\",\"\",\"\",\"\")"))
            return false;
    if (!SAY(work, "],[") || !append(work, drv->text.at, (Py_ssize_t)drv->text.size) || !put_masked_rest(drv, data) ||
        !sha256(work, digest))
        return false;
    base16(digest, masked);
    for (size_t i = 0; i < drv->output_count; i++) {
        const Output *output = &drv->outputs[i];
        work->size = 0;
        if (!name_of(&drv->found, name, output->name) || !SAY(work, "output:") || !PUT(work, output->name) ||
            !path_holds(work, masked, store, (Slice){drv->found.at, (Py_ssize_t)drv->found.size}, output->path))
            return false;
    }
    return true;
}

/* Whether every output is of one kind, has a true path and the same in the environment; `modulo` is written. */
static bool outputs_hold(Drv *drv, Slice store, Slice name, Slice data, bool *fixed, unsigned char modulo[DIGEST]) {
    *fixed = drv->outputs[0].algo.size > 0;
    for (size_t i = 0; i < drv->output_count; i++) {
        const Output *output = &drv->outputs[i];
        if (!output->path.size || (output->algo.size > 0) != *fixed || (output->hash.size > 0) != *fixed ||
            !name_of(&drv->found, name, output->name) || !output->value.at || compare(output->value, output->path))
            return false;
    }
    return *fixed ? fixed_holds(drv, store, name, modulo) : addressed_hold(drv, store, name, data, modulo);
}

/* --- What is told of it --- */

static bool put_strings(Text *json, const Slices *list, Py_ssize_t skipped) {
    if (!SAY(json, "["))
        return false;
    for (size_t i = 0; i < list->count; i++)
        if ((i && !SAY(json, ",")) || !SAY(json, "\"") ||
            !append(json, list->items[i].at + skipped, list->items[i].size - skipped) || !SAY(json, "\""))
            return false;
    return SAY(json, "]");
}

/* The words of a value, sorted, once each. */
static bool read_features(Slice value, Slices *list) {
    const char *start = value.at, *end = value.at + value.size;
    for (const char *at = start; at && at <= end; at++) {
        if (at < end && (*at < ' ' || *at > '~' || *at == '\\'))
            return false;
        if (at < end && *at != ' ')
            continue;
        if (at > start && !add(list, (Slice){start, at - start}))
            return false;
        start = at + 1;
    }
    sort_unique(list);
    return true;
}

/* As `derivation_records` has it of a node: system, features, outputs, needs, sources. */
static bool write_detail(Drv *drv, Slice store) {
    Text *json = &drv->detail;
    Slices features = {NULL, 0, 0};
    bool builtin = drv->builder.size >= 8 && !memcmp(drv->builder.at, "builtin:", 8);
    bool done = read_features(drv->features, &features) && SAY(json, "[\"") &&
                (builtin ? SAY(json, "builtin") : PUT(json, drv->system)) && SAY(json, "\",") &&
                put_strings(json, &features, 0) && SAY(json, ",[");
    free(features.items);
    for (size_t i = 0; done && i < drv->output_count; i++)
        done = (!i || SAY(json, ",")) && SAY(json, "[\"") && PUT(json, drv->outputs[i].name) && SAY(json, "\",\"") &&
               PUT(json, drv->outputs[i].path) && SAY(json, "\"]");
    return done && SAY(json, "],") && put_strings(json, &drv->inputs, store.size + 1) && SAY(json, ",") &&
           put_strings(json, &drv->sources, 0) && SAY(json, "]");
}

static PyObject *told(Drv *drv, Slice store, PyObject *base, PyObject *known, bool fixed,
                      const unsigned char modulo[DIGEST]) {
    const Output *first = &drv->outputs[0];
    Text *record = &drv->found, *content = &drv->work, *inputs = &drv->text;
    record->size = content->size = inputs->size = 0;
    char hex[HEX];
    base16(modulo, hex);
    bool done = append(record, hex, HEX) && append(record, fixed ? "f" : "i", 1) && put_strings(inputs, &drv->paths, 0) && write_detail(drv, store);
    for (size_t i = 0; done && i < drv->output_count; i++) {
        const Output *output = &drv->outputs[i];
        first = compare(output->path, first->path) < 0 ? output : first;
        done = PUT(record, output->name) && append(record, "", 1) && PUT(record, output->path) && append(record, "", 1);
    }
    if (done && fixed)
        done = PUT(content, first->algo) && SAY(content, ":") && PUT(content, first->hash);
    if (!done)
        return NULL;
    PyObject *kept = PyBytes_FromStringAndSize(record->at, (Py_ssize_t)record->size);
    bool is_kept = kept && PyDict_SetItem(known, base, kept) == 0;
    Py_XDECREF(kept);
    if (!is_kept)
        return NULL;
    return Py_BuildValue("(s#is#y#y#y#)", first->path.at + store.size + 1, first->path.size - store.size - 1,
                         (int)fixed, fixed ? content->at : "", (Py_ssize_t)content->size, (const char *)modulo, (Py_ssize_t)DIGEST,
                         drv->detail.at, (Py_ssize_t)drv->detail.size, inputs->at, (Py_ssize_t)inputs->size);
}

static PyObject *verify(PyObject *module, PyObject *arguments) {
    (void)module;
    PyObject *base_object, *known;
    Slice store, base, data;
    const char *data_at;
    if (!PyArg_ParseTuple(arguments, "s#Uy#O!:verify", &store.at, &store.size, &base_object, &data_at, &data.size,
                          &PyDict_Type, &known))
        return NULL;
    data.at = data_at;
    base.at = PyUnicode_AsUTF8AndSize(base_object, &base.size);
    /* A base name that no text can be is no store path either. */
    if (!base.at)
        PyErr_Clear();
    Drv *drv = base.at ? calloc(1, sizeof *drv) : NULL;
    PyObject *result = NULL, *held = PyList_New(0);
    if (drv && held && is_base(base) && base.size > HASH_PART + 1 + LENGTH(SUFFIX) &&
        !memcmp(base.at + base.size - LENGTH(SUFFIX), SUFFIX, (size_t)LENGTH(SUFFIX))) {
        Slice name = {base.at + HASH_PART + 1, base.size - HASH_PART - 1 - LENGTH(SUFFIX)};
        bool fixed;
        unsigned char modulo[DIGEST];
        if (read_drv(drv, data) && own_path_holds(drv, store, base, data) && resolve(drv, store, known, held) &&
            outputs_hold(drv, store, name, data, &fixed, modulo))
            result = told(drv, store, base_object, known, fixed, modulo);
    }
    if (drv) {
        void *all[] = {drv->inputs.items,  drv->names.items, drv->sources.items, drv->starts.at, drv->work.at,
                       drv->paths.items,   drv->entries.items, drv->modulos.at,  drv->text.at,   drv->detail.at,
                       drv->found.at};
        for (size_t i = 0; i < sizeof all / sizeof *all; i++)
            free(all[i]);
        free(drv);
    }
    Py_XDECREF(held);
    if (result || PyErr_Occurred())
        return result;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"verify", verify, METH_VARARGS, "What a derivation is, if it is common and true; it is then known to those above."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "infra.nix.verify_native", "Verification of common derivations.", -1, methods,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit_verify_native(void) {
    PyObject *hashlib = PyImport_ImportModule("hashlib");
    sha256_of = hashlib ? PyObject_GetAttrString(hashlib, "sha256") : NULL;
    digest_name = PyUnicode_FromString("digest");
    Py_XDECREF(hashlib);
    return sha256_of && digest_name ? PyModule_Create(&definition) : NULL;
}
