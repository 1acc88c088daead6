// Plain C interface of the Rust library: tokenizers, chat templates, HTTP downloads. src/text and src/hub are its only users.
//
// Strings go in as pointer + length, UTF-8, not NUL-terminated. Everything that comes out owned is freed by the function named beside it.
// Functions that can fail return 0 or a negative MLXLM_E_ code, and then set *error (freed with mlxlm_string_free). A panic of the library
// is caught at the edge and reported as MLXLM_E_INTERNAL. Handles are immutable after they were made: all functions are thread-safe.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
  MLXLM_OK = 0,
  MLXLM_E_INVALID = -1,    // the input is wrong: broken tokenizer.json, template syntax, bad URL
  MLXLM_E_RAISED = -2,     // a template called raise_exception; the message is the template's own
  MLXLM_E_NETWORK = -3,    // connect, TLS, time-out, broken transfer
  MLXLM_E_CANCELLED = -4,  // a callback asked to stop
  MLXLM_E_INTERNAL = -5,   // a panic inside the library
  MLXLM_E_UNSUPPORTED = -6
};

/** Owned bytes; data is never NULL after success or error, and has a NUL behind its end that size does not count. */
typedef struct {
  char* data;
  size_t size;
} MlxlmString;
void mlxlm_string_free(MlxlmString string);

typedef struct {
  uint32_t* data;
  size_t size;
} MlxlmIds;
void mlxlm_ids_free(MlxlmIds ids);

// --- tokenizer ---------------------------------------------------------------------------------------------------------------------
typedef struct MlxlmTokenizer MlxlmTokenizer;

/** From the bytes of a tokenizer.json. Truncation and padding settings in it are ignored. */
int mlxlm_tokenizer_new(const char* json, size_t json_size, MlxlmTokenizer** out, MlxlmString* error);
/** The same with the vocabulary and the merges of a byte-pair model beside it, which spares writing and parsing them: `json` has an empty "vocab" and empty
 *  "merges". token_ends [token_count]: where each token ends in token_text. merges [merge_count][2]: ids of the two parts, best pair first. */
int mlxlm_tokenizer_new_bpe(const char* json, size_t json_size, const char* token_text, const uint64_t* token_ends, size_t token_count,
                            const uint32_t* merges, size_t merge_count, MlxlmTokenizer** out, MlxlmString* error);
void mlxlm_tokenizer_free(MlxlmTokenizer* tokenizer);
/** Adds a token that is matched whole; one that the vocabulary already has keeps its id. Not thread-safe: only before the handle is shared.
 */
int mlxlm_tokenizer_add_token(MlxlmTokenizer* tokenizer, const char* token, size_t token_size, int special, int normalized, int lstrip,
                              int rstrip, MlxlmString* error);
/** The "decoder" of tokenizer.json, as JSON ("null" when there is none). */
int mlxlm_tokenizer_decoder(const MlxlmTokenizer* tokenizer, MlxlmString* out, MlxlmString* error);
int mlxlm_tokenizer_encode(const MlxlmTokenizer* tokenizer, const char* text, size_t text_size, int add_special_tokens, MlxlmIds* out,
                           MlxlmString* error);
/** Unknown ids are skipped. */
int mlxlm_tokenizer_decode(const MlxlmTokenizer* tokenizer, const uint32_t* ids, size_t ids_size, int skip_special_tokens, MlxlmString* out,
                           MlxlmString* error);
/** Number of entries, added tokens included. */
size_t mlxlm_tokenizer_vocab_size(const MlxlmTokenizer* tokenizer);
/** The id, or -1. */
int64_t mlxlm_tokenizer_token_to_id(const MlxlmTokenizer* tokenizer, const char* token, size_t token_size);
/** 1 and *out, or 0. */
int mlxlm_tokenizer_id_to_token(const MlxlmTokenizer* tokenizer, uint32_t id, MlxlmString* out);
/** The whole vocabulary (or only what was added to the model): text of all tokens back to back, `count` = highest id + 1, token i is [offsets[i], offsets[i + 1]).
 *  flags[i]: 1 = exists, 2 = added token, 4 = special. */
typedef struct {
  char* text;
  size_t text_size;
  uint64_t* offsets;  // count + 1
  uint8_t* flags;     // count
  size_t count;
} MlxlmVocabulary;
int mlxlm_tokenizer_vocabulary(const MlxlmTokenizer* tokenizer, int only_added, MlxlmVocabulary* out, MlxlmString* error);
void mlxlm_vocabulary_free(MlxlmVocabulary vocabulary);

// --- chat templates ----------------------------------------------------------------------------------------------------------------
typedef struct MlxlmTemplate MlxlmTemplate;

/** Jinja as transformers configures it. Its limits on work, depth and size end hostile templates with MLXLM_E_INVALID. */
int mlxlm_template_new(const char* source, size_t source_size, MlxlmTemplate** out, MlxlmString* error);
void mlxlm_template_free(MlxlmTemplate* chat_template);
/** context_json: an object, whose keys are the template's variables. */
int mlxlm_template_render(const MlxlmTemplate* chat_template, const char* context_json, size_t context_json_size, MlxlmString* out,
                          MlxlmString* error);

// --- HTTP --------------------------------------------------------------------------------------------------------------------------
/** Strings are NUL-terminated, "" when the header is absent. */
typedef struct MlxlmHttpHead {
  int status;
  int64_t content_length;     // -1 = unknown
  const char* url;            // of the final answer
  const char* etag;           // as sent, with quotes and W/
  const char* x_linked_etag;  // as sent
  int64_t x_linked_size;      // -1 = absent
  const char* x_repo_commit;
  const char* location;
  const char* content_range;
  const char* content_type;
  const char* accept_ranges;
  const char* x_error_code;  // Hugging Face: RepoNotFound, GatedRepo, ...
  const char* x_error_message;
  const char* headers;  // all of the final answer, "name: value\n" each
} MlxlmHttpHead;

typedef struct {
  const char* url;  // NUL-terminated, http:// or https://
  /** NUL-terminated header lines "Name: value", separated by '\n'; NULL = none. Authorization goes to the first host only, not along
   * redirects to another. */
  const char* headers;
  const char* method;        // "GET" (also when NULL) or "HEAD"
  int64_t range_start;       // > 0: sends "Range: bytes=N-"; the answer is 206, or 200 with the whole content
  int follow_redirects;      // how many (0 = none: the 3xx is the answer)
  int follow_relative_only;  // follow only redirects to a relative location; another 3xx is the answer (as huggingface_hub reads metadata)
  int connect_timeout_ms;    // 0 = 10000
  int read_timeout_ms;       // time without a byte; 0 = 30000
  /** Called once before the body when the final answer's head is here; the struct lives during the call. NULL = not wanted. Non-zero =
   * stop. */
  int (*on_head)(void* context, const MlxlmHttpHead* head);
  /** Called with each piece of the body, of any status. NULL = the body is dropped. Non-zero = stop. */
  int (*on_body)(void* context, const char* data, size_t size);
  void* context;
} MlxlmHttpRequest;

/** One request, streaming. Blocks. HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY are honoured; SSL_CERT_FILE and SSL_CERT_DIR too.
 *  *status is the final status (also of 4xx and 5xx, which are no errors of this function); 0 when there was none.
 *  Returns MLXLM_OK, MLXLM_E_INVALID, MLXLM_E_NETWORK, MLXLM_E_CANCELLED. A body shorter than its content-length is MLXLM_E_NETWORK. */
int mlxlm_http(const MlxlmHttpRequest* request, int* status, MlxlmString* error);

#ifdef __cplusplus
}  // extern "C"
#endif
