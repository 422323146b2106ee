import { hash } from 'node:crypto'

/** The sender of a request, as far as its credentials tell. */
export interface Caller {
  /** A `key` is a service, which may identify anyone. A `user` may identify only as `userId`. */
  kind: 'key' | 'user' | 'anonymous'
  /** The caller in the log: its kind, for a key with its name. Letters, digits and `.:_-`. */
  label: string
  /** The name by which its requests are counted; undefined for an anonymous caller, which is its address. */
  limitKey?: string
  userId?: string
}

export const ANONYMOUS: Caller = { kind: 'anonymous', label: 'anonymous' }

/** Returns the first 16 hex digits of a digest of `text`: enough to tell callers apart, and useless to pose as one. */
export const shortDigest = (text: string) => hash('sha256', text).slice(0, 16)
