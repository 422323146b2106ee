import type { FieldError } from './identity.ts'
import { isSameDevice } from './ids.ts'
import type { Merge } from './merge.ts'

/** Who wants to merge. */
export interface Merger {
  /** The only user that the caller may identify. */
  userId: string | undefined
  /** True for a service, which may merge two users. */
  isService: boolean
}

/** Why an event must not merge: whether the caller or the event is wrong, and a sentence that names the property. */
export interface Refusal { code: 'invalid_identity' | 'forbidden', reason: string }

/** Ids that break no rule, to judge the other one alone. */
const ANY_USER = 'user'
const ANY_DEVICE = '6e5b1c52-3f0a-4d7e-9b61-0c2a8d94f713'

const LIKE_A_DEVICE = /^\$device:|^[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i

/**
 * Returns why an event may not merge its two ids; undefined if it may. `check` decides for `POST /identify` too.
 * `$create_alias` may name two users, which only a service may merge.
 */
export function refuseMerge (
  { kind, identity, names, conflict }: Merge, check: (identity: object) => FieldError[], merger: Merger
): Refusal | undefined {
  const { identified_id: user, anon_id: other } = identity
  const isTwoUsers = kind === 'alias' && typeof other === 'string' && !LIKE_A_DEVICE.test(other) &&
    check({ identified_id: ANY_USER, anon_id: other }).length > 0
  const [error] = isTwoUsers ? checkUsers(user, other, check) : check(identity)
  if (error !== undefined) {
    const name = names[error.pointer.slice(1) as keyof Merge['names']]
    return { code: 'invalid_identity', reason: `properties.${name} ${error.detail}` }
  }
  if (conflict !== undefined) {
    return { code: 'invalid_identity', reason: `properties.${conflict[1]} must be equal to properties.${conflict[0]}` }
  }
  if (merger.userId !== undefined && user !== merger.userId) {
    return { code: 'forbidden', reason: `properties.${names.identified_id} is not the user of the token` }
  }
  return isTwoUsers && !merger.isService
    ? { code: 'forbidden', reason: `properties.${names.anon_id} is a user, and only a service may merge two users` }
    : undefined
}

/** Returns the errors of two ids that are both of users. */
function checkUsers (user: unknown, other: string, check: (identity: object) => FieldError[]): FieldError[] {
  const errors = [
    ...check({ ...user !== undefined && { identified_id: user }, anon_id: ANY_DEVICE }),
    ...check({ identified_id: other, anon_id: ANY_DEVICE }).map(({ detail }) => ({ pointer: '/anon_id', detail }))
  ]
  return typeof user === 'string' && isSameDevice(user, other)
    ? [...errors, { pointer: '/identified_id', detail: 'must not be equal to distinct_id' }]
    : errors
}
