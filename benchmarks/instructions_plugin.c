/* A plugin for qemu's user-mode emulator of 64-bit ARM: instructions executed, and fmla.4s among them, by function.

     qemu-aarch64 -d plugin -plugin instructions.so,out=FILE,prefix=MODEL_ program ...

   writes a line "NAME INSTRUCTIONS FMLA" per function when the program ends. A block of instructions counts for the
   function that it begins in. The bodies of parallel loops have no names: qemu translates code when it is first reached,
   so they belong to the kernel, a function whose name begins with `prefix`, that was translated last. qemu resolves
   names only while it logs something, therefore -d plugin. */
#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Of qemu's own header, which its packages do not install. */
typedef uint64_t qemu_plugin_id_t;
typedef struct qemu_info_t qemu_info_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
enum qemu_plugin_op { QEMU_PLUGIN_INLINE_ADD_U64 };
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);
const char *qemu_plugin_insn_symbol(const struct qemu_plugin_insn *);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, enum qemu_plugin_op, void *, uint64_t);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, struct qemu_plugin_tb *));
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, void *), void *);

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

enum { FUNCTIONS = 4096 };
static struct function {
  char *name;
  uint64_t instructions, fmla;
} functions[FUNCTIONS];
static const char *out = "", *prefix = "";
static struct function *kernel;

static struct function *find(const char *name) {
  for (struct function *f = functions; f < functions + FUNCTIONS - 1; f++) {
    if (!f->name) f->name = strdup(name);
    if (strcmp(f->name, name) == 0) return f;
  }
  functions[FUNCTIONS - 1].name = "others";
  return functions + FUNCTIONS - 1;
}

static bool is_fmla(uint32_t word) {
  bool by_vector = (word & 0xffe0fc00) == 0x4e20cc00, by_element = (word & 0xffc0f400) == 0x4f801000;
  return by_vector || by_element;
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *block) {
  size_t count = qemu_plugin_tb_n_insns(block);
  uint64_t fmla = 0;
  for (size_t i = 0; i < count; i++) {
    uint32_t word;
    memcpy(&word, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(block, i)), sizeof word);
    fmla += is_fmla(word);
  }
  const char *name = count ? qemu_plugin_insn_symbol(qemu_plugin_tb_get_insn(block, 0)) : 0;
  bool named = name && *name;
  struct function *f = named || !kernel ? find(named ? name : "?") : kernel;
  if (named && strncmp(name, prefix, strlen(prefix)) == 0) kernel = f;
  if (named && strcmp(name, "main") == 0) kernel = 0;
  qemu_plugin_register_vcpu_tb_exec_inline(block, QEMU_PLUGIN_INLINE_ADD_U64, &f->instructions, count);
  if (fmla) qemu_plugin_register_vcpu_tb_exec_inline(block, QEMU_PLUGIN_INLINE_ADD_U64, &f->fmla, fmla);
}

static void ended(qemu_plugin_id_t id, void *data) {
  FILE *file = fopen(out, "w");
  if (!file) return;
  for (struct function *f = functions; f < functions + FUNCTIONS && f->name; f++)
    fprintf(file, "%s %" PRIu64 " %" PRIu64 "\n", f->name, f->instructions, f->fmla);
  fclose(file);
}

__attribute__((visibility("default"))) int qemu_plugin_install(
    qemu_plugin_id_t id, const qemu_info_t *info, int count, char **arguments) {
  for (int i = 0; i < count; i++)
    if (strncmp(arguments[i], "out=", 4) == 0)
      out = strdup(arguments[i] + 4);
    else if (strncmp(arguments[i], "prefix=", 7) == 0)
      prefix = strdup(arguments[i] + 7);
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_atexit_cb(id, ended, 0);
  return 0;
}
