/* The parts of libSystem and IOKit that the agent calls, with the layouts of Apple's headers, for tests on any machine.
 * Built by gcc in the test; what it answers is set through the variables that begin with fake_. */
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

/* ---- notify(3) ---- */

int fake_notify_status = 0;
int fake_state_status = 0;
uint64_t fake_level = 0;
int fake_cancelled = 0;
static int pipe_ends[2] = {-1, -1};
static char registered[128];

uint32_t notify_register_file_descriptor(const char *name, int *descriptor, int flags, int *token) {
    if (fake_notify_status || flags != 0) return fake_notify_status ? (uint32_t)fake_notify_status : 3;
    if (pipe(pipe_ends) != 0) return 1000000;
    strncpy(registered, name, sizeof registered - 1);
    *descriptor = pipe_ends[0];
    *token = 77;
    return 0;
}

uint32_t notify_get_state(int token, uint64_t *state) {
    if (fake_state_status || token != 77) return 2;
    *state = strcmp(registered, "com.apple.system.thermalpressurelevel") == 0 ? fake_level : 9;
    return 0;
}

uint32_t notify_cancel(int token) {
    if (token != 77) return 2;
    fake_cancelled++;
    return 0;
}

void fake_post(uint64_t level) {
    uint32_t token = 77;
    fake_level = level;
    ssize_t written = write(pipe_ends[1], &token, sizeof token);
    (void)written;
}

/* ---- sysctlbyname(3) ---- */

struct xsw_usage {
    uint64_t xsu_total, xsu_avail, xsu_used;
    uint32_t xsu_pagesize;
    int32_t xsu_encrypted;
};

int fake_pressure = 1;
int fake_wired_limit_mb = 0;
int fake_swap_broken = 0;

uint64_t fake_memsize = 24ull << 30;
int fake_long_value = 0; /* bytes that a structure has grown by */

/* as the kernel does: a buffer that is too small gets nothing and ENOMEM */
static int told(void *old, size_t *size, const void *value, size_t length) {
    if (*size < length) {
        errno = ENOMEM;
        return -1;
    }
    memcpy(old, value, *size = length);
    return 0;
}

int sysctlbyname(const char *name, void *old, size_t *size, void *fresh, size_t fresh_size) {
    (void)fresh;
    (void)fresh_size;
    if (!strcmp(name, "hw.memsize") && fake_memsize) return told(old, size, &fake_memsize, sizeof fake_memsize);
    if (!strcmp(name, "kern.memorystatus_vm_pressure_level") && fake_pressure >= 0) {
        memcpy(old, &fake_pressure, *size = sizeof fake_pressure);
        return 0;
    }
    if (!strcmp(name, "iogpu.wired_limit_mb")) {
        memcpy(old, &fake_wired_limit_mb, *size = sizeof fake_wired_limit_mb);
        return 0;
    }
    if (!strcmp(name, "hw.model")) {
        memcpy(old, "Mac16,10", *size = sizeof "Mac16,10");
        return 0;
    }
    if (!strcmp(name, "vm.swapusage")) {
        struct xsw_usage usage = {4096ull << 20, 1352ull << 20, 2744ull << 20, 16384, 1};
        if (fake_swap_broken) usage.xsu_used = usage.xsu_total + 1;
        static uint8_t grown[1 << 20];
        memcpy(grown, &usage, sizeof usage);
        return told(old, size, grown, sizeof usage + (size_t)fake_long_value);
    }
    errno = ENOENT;
    return -1;
}

/* ---- host_statistics64 ---- */

struct vm_statistics64 {
    uint32_t free_count, active_count, inactive_count, wire_count;
    uint64_t zero_fill_count, reactivations, pageins, pageouts, faults, cow_faults, lookups, hits, purges;
    uint32_t purgeable_count, speculative_count;
    uint64_t decompressions, compressions, swapins, swapouts;
    uint32_t compressor_page_count, throttled_count, external_page_count, internal_page_count;
    uint64_t total_uncompressed_pages_in_compressor;
} __attribute__((aligned(8)));

int fake_vm_status = 0;
int fake_vm_words = 38;     /* of this release's structure: 38 in macOS 14, 62 in 26, 104 in 27 */
int fake_vm_patience = -1;  /* calls with fewer words that are answered before the kernel insists on its own; -1: all */
int fake_vm_calls = 0;
int fake_vm_complaints = 0; /* "count is larger than expected ... likely to result in memory corruption" */
uint64_t fake_page_size = 16384;
uint64_t fake_swapins = 20, fake_swapouts = 30;
uint32_t fake_internal = 400000, fake_purgeable = 50000, fake_wired = 100000, fake_compressor = 25000;

uint32_t mach_host_self(void) { return 515; }

int host_page_size(uint32_t host, uint64_t *size) {
    if (host != 515) return 4;
    *size = fake_page_size;
    return 0;
}

int host_statistics64(uint32_t host, int flavor, void *out, uint32_t *count) {
    if (fake_vm_status || host != 515 || flavor != 4) return fake_vm_status ? fake_vm_status : 4;
    if (*count < sizeof(struct vm_statistics64) / 4) return 4;
    fake_vm_calls++;
    if (*count > (uint32_t)fake_vm_words) fake_vm_complaints++;
    if (*count < (uint32_t)fake_vm_words && fake_vm_patience >= 0 && fake_vm_calls > fake_vm_patience) {
        *count = (uint32_t)fake_vm_words;
        return -307;
    }
    uint32_t filled = *count < (uint32_t)fake_vm_words ? *count : (uint32_t)fake_vm_words;
    struct vm_statistics64 statistics;
    memset(&statistics, 0x5a, sizeof statistics); /* what is not asked for must not matter */
    statistics.wire_count = fake_wired;
    statistics.purgeable_count = fake_purgeable;
    statistics.swapins = fake_swapins;
    statistics.swapouts = fake_swapouts;
    statistics.compressor_page_count = fake_compressor;
    statistics.internal_page_count = fake_internal;
    memset(out, 0x5a, filled * 4);
    memcpy(out, &statistics, sizeof statistics);
    *count = filled >= 62 ? filled : sizeof statistics / 4;
    return 0;
}

uint32_t fake_ticks_user = 100, fake_ticks_idle = 900;
int fake_cpu_status = 0;

int host_statistics(uint32_t host, int flavor, void *out, uint32_t *count) {
    if (fake_cpu_status || host != 515 || flavor != 3 || *count < 4) return fake_cpu_status ? fake_cpu_status : 4;
    uint32_t ticks[] = {fake_ticks_user, 0, fake_ticks_idle, 0};
    memcpy(out, ticks, sizeof ticks);
    *count = 4;
    return 0;
}

/* ---- IOKit and the SMC ---- */

typedef struct { uint8_t major, minor, build, reserved; uint16_t release; } Version;
typedef struct { uint16_t version, length; uint32_t cpu, gpu, memory; } Limits;
typedef struct { uint32_t size, kind; uint8_t attributes; } Info;
typedef struct {
    uint32_t key;
    Version version;
    Limits limits;
    Info info;
    uint8_t result, status, command;
    uint32_t index;
    uint8_t bytes[32];
} KeyData;

_Static_assert(sizeof(KeyData) == 80, "the structure that the controller takes has 80 bytes");

uint32_t mach_task_self_ = 259;
int fake_has_smc = 1;
int fake_open_status = 0;
int fake_call_status = 0;
int fake_short_answer = 0;
int fake_open_connections = 0;
int fake_unreleased = 0;
static int next_service = 0;

struct Key { const char *name, *kind; uint32_t size; uint8_t bytes[8]; };
static struct Key keys[64];
static uint32_t key_count = 0;

void fake_clear_keys(void) { key_count = 0; }

void fake_add_key(const char *name, const char *kind, uint32_t size, const uint8_t *bytes) {
    struct Key *key = &keys[key_count++];
    key->name = strdup(name);
    key->kind = strdup(kind);
    key->size = size;
    memcpy(key->bytes, bytes, size);
}

static uint32_t four(const char *name) {
    return (uint32_t)(uint8_t)name[0] << 24 | (uint32_t)(uint8_t)name[1] << 16 | (uint32_t)(uint8_t)name[2] << 8 | (uint8_t)name[3];
}

void *IOServiceMatching(const char *name) { return strcmp(name, "AppleSMC") ? 0 : &keys; }

int IOServiceGetMatchingServices(uint32_t port, void *matching, uint32_t *iterator) {
    if (port != 0 || matching != &keys || !fake_has_smc) return 5;
    next_service = 0;
    fake_unreleased++;
    *iterator = 900;
    return 0;
}

uint32_t IOIteratorNext(uint32_t iterator) {
    static const uint32_t services[] = {901, 902, 0};
    if (iterator != 900 || !services[next_service]) return 0;
    fake_unreleased++;
    return services[next_service++];
}

int IORegistryEntryGetName(uint32_t service, char *name) {
    strcpy(name, service == 902 && fake_has_smc != 2 ? "AppleSMCKeysEndpoint" : "AppleSMC");
    return 0;
}

int IOServiceOpen(uint32_t service, uint32_t task, uint32_t type, uint32_t *connection) {
    if (fake_open_status) return fake_open_status;
    if (service != 902 || task != 259 || type != 0) return 1;
    fake_open_connections++;
    *connection = 903;
    return 0;
}

int IOServiceClose(uint32_t connection) {
    if (connection != 903) return 1;
    fake_open_connections--;
    return 0;
}

int IOObjectRelease(uint32_t object) {
    (void)object;
    fake_unreleased--;
    return 0;
}

int IOConnectCallStructMethod(uint32_t connection, uint32_t selector, const void *in, size_t in_size, void *out, size_t *out_size) {
    const KeyData *asked = in;
    KeyData *answer = out;
    if (fake_call_status) return fake_call_status;
    if (connection != 903 || selector != 2 || in_size != 80 || *out_size != 80) return 2;
    memset(answer, 0, sizeof *answer);
    if (fake_short_answer) *out_size = 40;
    if (asked->command == 8) {
        if (asked->index >= key_count) { answer->result = 132; return 0; }
        answer->key = four(keys[asked->index].name);
        return 0;
    }
    for (uint32_t n = 0; n <= key_count; n++) {
        uint8_t count[4] = {key_count >> 24, key_count >> 16, key_count >> 8, key_count};
        struct Key number = {"#KEY", "ui32", 4, {count[0], count[1], count[2], count[3]}};
        const struct Key *key = n == key_count ? &number : &keys[n];
        if (four(key->name) != asked->key) continue;
        if (asked->command == 9) {
            answer->info.size = key->size;
            answer->info.kind = four(key->kind);
            return 0;
        }
        if (asked->command == 5 && strchr(key->name, '!')) { /* there, and not to be read */
            answer->result = 133;
            return 0;
        }
        if (asked->command == 5 && asked->info.size == key->size) {
            memcpy(answer->bytes, key->bytes, key->size);
            return 0;
        }
        return 7;
    }
    answer->result = 132;
    return 0;
}
