//! tokenizer.json <-> token ids, through the crate `tokenizers`.

use crate::*;
use tokenizers::models::bpe::BPE;
use tokenizers::{AddedToken, Tokenizer};

pub struct MlxlmTokenizer(Tokenizer);

#[repr(C)]
pub struct MlxlmIds {
    data: *mut u32,
    size: usize,
}

#[repr(C)]
pub struct MlxlmVocabulary {
    text: *mut c_char,
    text_size: usize,
    offsets: *mut u64,
    flags: *mut u8,
    count: usize,
}

fn leak<T>(values: Vec<T>) -> *mut T {
    Box::into_raw(values.into_boxed_slice()) as *mut T
}

unsafe fn reclaim<T>(data: *mut T, size: usize) {
    if !data.is_null() {
        drop(Box::from_raw(std::ptr::slice_from_raw_parts_mut(data, size)));
    }
}

#[no_mangle]
pub unsafe extern "C" fn mlxlm_tokenizer_new(
    json: *const c_char,
    json_size: usize,
    out: *mut *mut MlxlmTokenizer,
    error: *mut MlxlmString,
) -> c_int {
    guard(error, || {
        let mut tokenizer = match quick_byte_pairs(bytes(json, json_size)) {
            Some(tokenizer) => tokenizer,
            None => Tokenizer::from_bytes(bytes(json, json_size)).map_err(invalid)?,
        };
        tokenizer.with_truncation(None).map_err(invalid)?;
        tokenizer.with_padding(None);
        out.write(Box::into_raw(Box::new(MlxlmTokenizer(tokenizer))));
        Ok(())
    })
}

/// A tokenizer.json whose model is of byte pairs, without the crate's way of trying each kind of model on a copy of the vocabulary (twice as
/// fast). None for all that is unusual or wrong: the crate reads it then, or says what is wrong.
fn quick_byte_pairs(json: &[u8]) -> Option<Tokenizer> {
    let mut document: serde_json::Value = serde_json::from_slice(json).ok()?;
    let options = document.get_mut("model")?.as_object_mut()?;
    if options.get("type")?.as_str()? != "BPE" || !options.get("dropout").map_or(true, |d| d.is_null()) {
        return None;
    }
    let serde_json::Value::Object(vocabulary) = options.insert("vocab".into(), serde_json::json!({}))? else { return None };
    let serde_json::Value::Array(merges) = options.insert("merges".into(), serde_json::json!([]))? else { return None };
    let ids = vocabulary.into_iter().map(|(token, id)| Some((token, u32::try_from(id.as_u64()?).ok()?)));
    let ids = ids.collect::<Option<ahash::AHashMap<String, u32>>>()?;
    let merges = merges.into_iter().map(merge).collect::<Option<Vec<_>>>()?;
    let model = byte_pair_model(&serde_json::Value::Object(options.clone()), ids, merges).ok()?;
    with_model(document, model).ok()
}

fn merge(value: serde_json::Value) -> Option<(String, String)> {
    match value {
        serde_json::Value::String(text) => {
            let (left, right) = text.split_once(' ')?;
            (!right.contains(' ')).then(|| (left.to_string(), right.to_string()))
        }
        serde_json::Value::Array(pair) => match <[serde_json::Value; 2]>::try_from(pair).ok()? {
            [serde_json::Value::String(left), serde_json::Value::String(right)] => Some((left, right)),
            _ => None,
        },
        _ => None,
    }
}

/// Byte-pair encoding over `tokens` (first one wins among equals); merges are pairs of their ids, best first.
fn byte_pairs(options: &serde_json::Value, tokens: &[&str], merges: &[[u32; 2]]) -> Outcome<BPE> {
    let mut vocabulary = ahash::AHashMap::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate() {
        vocabulary.entry(token.to_string()).or_insert(id as u32);
    }
    let token = |id: u32| tokens.get(id as usize).map(|t| t.to_string()).ok_or_else(|| invalid("a merge of no token"));
    let merges = merges.iter().map(|pair| Ok((token(pair[0])?, token(pair[1])?))).collect::<Outcome<Vec<_>>>()?;
    byte_pair_model(options, vocabulary, merges)
}

fn byte_pair_model(options: &serde_json::Value, vocabulary: ahash::AHashMap<String, u32>, merges: Vec<(String, String)>) -> Outcome<BPE> {
    let flag = |name: &str| options[name].as_bool().unwrap_or(false);
    let mut builder = BPE::builder()
        .vocab_and_merges(vocabulary, merges)
        .fuse_unk(flag("fuse_unk"))
        .byte_fallback(flag("byte_fallback"))
        .ignore_merges(flag("ignore_merges"));
    if let Some(unknown) = options["unk_token"].as_str() {
        builder = builder.unk_token(unknown.to_string());
    }
    if let Some(prefix) = options["continuing_subword_prefix"].as_str() {
        builder = builder.continuing_subword_prefix(prefix.to_string());
    }
    if let Some(suffix) = options["end_of_word_suffix"].as_str() {
        builder = builder.end_of_word_suffix(suffix.to_string());
    }
    builder.build().map_err(invalid)
}

/// The tokenizer of a tokenizer.json whose model is given instead. Added tokens take the ids of the vocabulary, so that must be there before them.
fn with_model(mut document: serde_json::Value, model: BPE) -> Outcome<Tokenizer> {
    let added = match document.get_mut("added_tokens") {
        Some(tokens) => std::mem::replace(tokens, serde_json::json!([])),
        None => serde_json::json!([]),
    };
    let added: Vec<AddedToken> = serde_json::from_value(added).map_err(invalid)?;
    let mut tokenizer: Tokenizer = serde_json::from_value(document).map_err(invalid)?;
    tokenizer.with_model(model);
    tokenizer.add_tokens(added).map_err(invalid)?;
    Ok(tokenizer)
}

unsafe fn slice<'a, T>(data: *const T, count: usize) -> &'a [T] {
    if count == 0 {
        &[]
    } else {
        std::slice::from_raw_parts(data, count)
    }
}

#[no_mangle]
pub unsafe extern "C" fn mlxlm_tokenizer_new_bpe(
    json: *const c_char,
    json_size: usize,
    token_text: *const c_char,
    token_ends: *const u64,
    token_count: usize,
    merges: *const u32,
    merge_count: usize,
    out: *mut *mut MlxlmTokenizer,
    error: *mut MlxlmString,
) -> c_int {
    guard(error, || {
        let ends = slice(token_ends, token_count);
        let all = text(token_text, ends.last().copied().unwrap_or(0) as usize)?;
        let mut tokens = Vec::with_capacity(token_count);
        let mut start = 0;
        for &end in ends {
            tokens.push(all.get(start..end as usize).ok_or_else(|| invalid("token ends out of order"))?);
            start = end as usize;
        }
        let document: serde_json::Value = serde_json::from_slice(bytes(json, json_size)).map_err(invalid)?;
        let model = byte_pairs(&document["model"], &tokens, slice(merges as *const [u32; 2], merge_count))?;
        out.write(Box::into_raw(Box::new(MlxlmTokenizer(with_model(document, model)?))));
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn mlxlm_tokenizer_free(tokenizer: *mut MlxlmTokenizer) {
    if !tokenizer.is_null() {
        guard(std::ptr::null_mut(), || {
            drop(Box::from_raw(tokenizer));
            Ok(())
        });
    }
}

#[no_mangle]
pub unsafe extern "C" fn mlxlm_tokenizer_add_token(
    tokenizer: *mut MlxlmTokenizer,
    token: *const c_char,
    size: usize,
    special: c_int,
    normalized: c_int,
    lstrip: c_int,
    rstrip: c_int,
    error: *mut MlxlmString,
) -> c_int {
    guard(error, || {
        let token = AddedToken::from(text(token, size)?, special != 0).normalized(normalized != 0).lstrip(lstrip != 0).rstrip(rstrip != 0);
        let tokenizer = &mut (*tokenizer).0;
        if special != 0 {
            tokenizer.add_special_tokens([token]).map_err(invalid)?;
        } else {
            tokenizer.add_tokens([token]).map_err(invalid)?;
        }
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn mlxlm_tokenizer_decoder(
    tokenizer: *const MlxlmTokenizer,
    out: *mut MlxlmString,
    error: *mut MlxlmString,
) -> c_int {
    guard(error, || {
        out.write(MlxlmString::new(serde_json::to_string(&(*tokenizer).0.get_decoder()).map_err(invalid)?));
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn mlxlm_tokenizer_encode(
    tokenizer: *const MlxlmTokenizer,
    input: *const c_char,
    size: usize,
    add_special_tokens: c_int,
    out: *mut MlxlmIds,
    error: *mut MlxlmString,
) -> c_int {
    guard(error, || {
        let encoding = (*tokenizer).0.encode_fast(text(input, size)?, add_special_tokens != 0).map_err(invalid)?;
        let ids = encoding.get_ids().to_vec();
        let size = ids.len();
        out.write(MlxlmIds { data: leak(ids), size });
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn mlxlm_ids_free(ids: MlxlmIds) {
    reclaim(ids.data, ids.size);
}

#[no_mangle]
pub unsafe extern "C" fn mlxlm_tokenizer_decode(
    tokenizer: *const MlxlmTokenizer,
    ids: *const u32,
    ids_size: usize,
    skip_special_tokens: c_int,
    out: *mut MlxlmString,
    error: *mut MlxlmString,
) -> c_int {
    guard(error, || {
        let ids = if ids_size == 0 { &[] } else { std::slice::from_raw_parts(ids, ids_size) };
        out.write(MlxlmString::new((*tokenizer).0.decode(ids, skip_special_tokens != 0).map_err(invalid)?));
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn mlxlm_tokenizer_vocab_size(tokenizer: *const MlxlmTokenizer) -> usize {
    let mut size = 0;
    guard(std::ptr::null_mut(), || {
        size = (*tokenizer).0.get_vocab_size(true);
        Ok(())
    });
    size
}

#[no_mangle]
pub unsafe extern "C" fn mlxlm_tokenizer_token_to_id(tokenizer: *const MlxlmTokenizer, token: *const c_char, size: usize) -> i64 {
    let mut id = -1;
    guard(std::ptr::null_mut(), || {
        id = (*tokenizer).0.token_to_id(text(token, size)?).map_or(-1, i64::from);
        Ok(())
    });
    id
}

#[no_mangle]
pub unsafe extern "C" fn mlxlm_tokenizer_id_to_token(tokenizer: *const MlxlmTokenizer, id: u32, out: *mut MlxlmString) -> c_int {
    let mut found = 0;
    guard(std::ptr::null_mut(), || {
        if let Some(token) = (*tokenizer).0.id_to_token(id) {
            out.write(MlxlmString::new(token));
            found = 1;
        }
        Ok(())
    });
    found
}

#[no_mangle]
pub unsafe extern "C" fn mlxlm_tokenizer_vocabulary(
    tokenizer: *const MlxlmTokenizer,
    only_added: c_int,
    out: *mut MlxlmVocabulary,
    error: *mut MlxlmString,
) -> c_int {
    guard(error, || {
        let tokenizer = &(*tokenizer).0;
        let mut entries: Vec<(u32, String, u8)> = Vec::new();
        if only_added == 0 {
            entries.extend(tokenizer.get_vocab(false).into_iter().map(|(t, id)| (id, t, 1)));
        }
        for (id, token) in tokenizer.get_added_tokens_decoder() {
            entries.push((id, token.content.clone(), if token.special { 7 } else { 3 }));
        }
        entries.sort_by(|a, b| (a.0, a.2).cmp(&(b.0, b.2)));
        let count = entries.last().map_or(0, |e| e.0 as usize + 1);
        if count > (1 << 24) {
            return Err(invalid(format!("highest token id is {}, wanted less than 16777216", count - 1)));
        }
        let mut flags = vec![0u8; count];
        let mut text = Vec::new();
        let mut offsets = vec![0u64; count + 1];
        let mut next = 0;
        for id in 0..count {
            let first = next;
            while next < entries.len() && entries[next].0 as usize == id {
                next += 1;
            }
            if next > first {
                text.extend_from_slice(entries[next - 1].1.as_bytes()); // an added token hides one of the model
                flags[id] = entries[next - 1].2;
            }
            offsets[id + 1] = text.len() as u64;
        }
        let text_size = text.len();
        out.write(MlxlmVocabulary { text: leak(text) as *mut c_char, text_size, offsets: leak(offsets), flags: leak(flags), count });
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn mlxlm_vocabulary_free(vocabulary: MlxlmVocabulary) {
    reclaim(vocabulary.text as *mut u8, vocabulary.text_size);
    reclaim(vocabulary.offsets, vocabulary.count + 1);
    reclaim(vocabulary.flags, vocabulary.count);
}
