/* Sets fake_mac.c's variables in a process that a test cannot reach: FAKE_MAC is like "fake_has_smc=0 fake_level=2". */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

extern int fake_notify_status, fake_has_smc, fake_vm_status, fake_swap_broken, fake_pressure;
extern uint64_t fake_level;
void fake_add_key(const char *name, const char *kind, uint32_t size, const uint8_t *bytes);

static void add_float(const char *name, float value) { fake_add_key(name, "flt ", 4, (const uint8_t *)&value); }

__attribute__((constructor)) static void settings(void) {
    add_float("Tp01", 61.25f);
    add_float("Tg0G", 52.5f);
    add_float("F0Ac", 1000.0f);
    add_float("PSTR", 12.5f);
    fake_add_key("RSSN", "ch8*", 8, (const uint8_t *)"SECRETSN");
    const char *said = getenv("FAKE_MAC");
    char *words = strdup(said ? said : "");
    for (char *word = strtok(words, " "); word; word = strtok(0, " ")) {
        char *value = strchr(word, '=');
        if (!value) continue;
        *value++ = 0;
        int number = atoi(value);
        if (!strcmp(word, "fake_notify_status")) fake_notify_status = number;
        if (!strcmp(word, "fake_has_smc")) fake_has_smc = number;
        if (!strcmp(word, "fake_vm_status")) fake_vm_status = number;
        if (!strcmp(word, "fake_swap_broken")) fake_swap_broken = number;
        if (!strcmp(word, "fake_pressure")) fake_pressure = number;
        if (!strcmp(word, "fake_level")) fake_level = (uint64_t)number;
    }
    free(words);
}
