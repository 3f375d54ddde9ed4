/* A plugin of QEMU's user mode that counts instructions, for emulate.py: the count so far at each mark of the guest.
 *
 * The guest marks by getpriority(0x5150, 0), which fails and does nothing. The file named by `out=` begins with the line
 * "marks"; then comes one count a line. Instructions are counted by translated block as it is entered, on all threads.
 * API: QEMU's include/qemu/qemu-plugin.h, version 1. No distribution packs the header, so what is used is declared here.
 */
#include <inttypes.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define WHICH 0x5150
enum { GETPRIORITY_X86_64 = 140, GETPRIORITY_ARM64 = 141 };

typedef uint64_t plugin_id;
struct qemu_plugin_tb;
enum qemu_plugin_op { QEMU_PLUGIN_INLINE_ADD_U64 };
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *block, enum qemu_plugin_op op, void *into,
                                              uint64_t value);
void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id id, void (*call)(plugin_id, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_syscall_cb(plugin_id id, void (*call)(plugin_id, unsigned int, int64_t, uint64_t, uint64_t,
                                                                     uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                                                                     uint64_t));

EXPORT int qemu_plugin_version = 1;
static uint64_t count;
static FILE *out;

static void translated(plugin_id id, struct qemu_plugin_tb *block)
{
    qemu_plugin_register_vcpu_tb_exec_inline(block, QEMU_PLUGIN_INLINE_ADD_U64, &count, qemu_plugin_tb_n_insns(block));
}

static void called(plugin_id id, unsigned int cpu, int64_t number, uint64_t which, uint64_t b, uint64_t c, uint64_t d,
                   uint64_t e, uint64_t f, uint64_t g, uint64_t h)
{
    if ((number == GETPRIORITY_X86_64 || number == GETPRIORITY_ARM64) && which == WHICH) {
        fprintf(out, "%" PRIu64 "\n", count);
        fflush(out);
    }
}

EXPORT int qemu_plugin_install(plugin_id id, const void *info, int argc, char **argv)
{
    if (argc != 1 || strncmp(argv[0], "out=", 4) != 0 || (out = fopen(argv[0] + 4, "w")) == NULL)
        return 1;
    fputs("marks\n", out);
    fflush(out);
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_vcpu_syscall_cb(id, called);
    return 0;
}
